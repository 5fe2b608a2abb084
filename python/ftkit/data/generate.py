"""Texts that a model writes by itself, from nothing but the token that opens a text: to distil from without data.

Every token is drawn from the model's own distribution, unchanged, so the texts are samples of what the model knows. The
i-th text depends on the model, the seed and i alone.

Source: data-free training of quantized models as in He et al., EfficientDM, 2023, arXiv 2310.03270, and Liu et al.,
LLM-QAT, 2023, arXiv 2305.17888.
"""

import hashlib
from collections.abc import Callable

from ftkit.engine import Engine, Sampling
from ftkit.errors import InputError

_PORTION = 64
"""Texts that are asked for at a time: twice what the engine computes together."""


def generate(
    engine: Engine,
    rows: int,
    tokens: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,  # noqa: ARG005
) -> list[str]:
    """`rows` texts of at most `tokens` tokens each; those that end before they begin are left out.

    `progress` is called with the number of texts so far. Raises InputError for a model without a token that a text
    could begin with, or one that writes nothing.
    """
    tokenizer = engine.loaded.tokenizer
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise InputError("generate: expected a tokenizer with a token that opens or ends a text, got neither")
    texts: list[str] = []
    asked = 0
    while len(texts) < rows:
        count = min(_PORTION, rows - len(texts))
        samplings = [Sampling(max_tokens=tokens, seed=_seed(seed, asked + row)) for row in range(count)]
        found = [answer.text for answer in engine.generate_many([[first]] * count, samplings, model=engine.default)]
        asked += count
        texts += [text for text in found if text.strip()]
        if asked > 20 * (len(texts) + 1):
            raise InputError(f"generate: expected texts, got {len(texts)} in {asked} attempts; the rest were empty")
        progress(len(texts))
    return texts


def _seed(seed: int, row: int) -> int:
    """A row's own seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:8], "little")
