"""How tokens are chosen, and when an answer ends. The core checks the bounds and does the choosing."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from ftkit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A request's sampling parameters. The default is the model's own distribution, unchanged.

    Applied in this order: logit_bias, repetition penalty, presence and frequency penalties, temperature, top_k, top_p,
    min_p.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None: what the context has room for."""
    temperature: float = 1.0
    """Divides the logits, 0 to 100; 0 takes the likeliest token."""
    top_k: int = 0
    """Keeps the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Keeps tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in the prompt or the answer."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the answer, −2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it is in the answer, −2 to 2."""
    seed: int | None = None
    """Same seed and same logits give the same tokens, alone or in a crowd; None draws one."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id → number added to its logit, −100 to 100."""
    logprobs: int | None = None
    """Reports tokens' log-probabilities under the model, with this many of the likeliest tokens; None: doesn't."""
    ignore_end: bool = False
    """Goes on after tokens that end an answer."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What the core says of a request."""
        table = json.loads(text)
        return cls(**table | {"stop": tuple(table["stop"]), "logit_bias": dict(table["logit_bias"])})

    def to_json(self) -> str:
        """The form in which the core reads it. Raises InputError for numbers that are not finite."""
        table = dataclasses.asdict(self)
        table["logit_bias"] = [[token, bias] for token, bias in self.logit_bias.items()]
        if self.seed is not None:
            table["seed"] = self.seed % 2**64
        try:
            return json.dumps(table, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise InputError(f"sampling: expected finite numbers and texts, got: {error}") from None


GREEDY = Sampling(temperature=0.0)
"""Always the likeliest token."""
