"""A smaller model that guesses the next tokens, which the model then checks in one step.

Its keys and values lie in a pool of their own, in pages of the same numbers as the model's: what is shared, kept, given
up or found again there is so here, too. It computes every batch that the model computes, so that both know the same
tokens, and knows no adapters.

The tokens of a draft are those that the request's own sampler, with the draws that it is about to use, would choose if
the small model's logits were the model's. Then the model's logits decide, with the same draws: so answers are the same
token by token as without drafts, for every seed, and a draft is the oftener right the more alike the two models are.

Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023, arXiv 2211.17192; Daliri et
al., Coupling without Communication and Drafter-Invariant Speculative Decoding, 2024, arXiv 2408.07978.
"""

import dataclasses

import torch
from torch import Tensor

from ftkit import _core
from ftkit.engine._whole import Whole
from ftkit.errors import InputError
from ftkit.kernels.next_logits import next_logits
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.paged_cache import PagedCache

TOKENS = 4
"""Most tokens of a draft, unless something else is asked for."""


class Drafter:
    """The small model over its pool."""

    def __init__(self, loaded: LoadedModel, *, pages: int, block_tokens: int, dtype: torch.dtype) -> None:
        """A pool of as many pages of as many tokens as the model's, in `dtype`."""
        self._model, config = loaded.model, loaded.config
        sizes = {"layers": config.layers, "key_value_heads": config.key_value_heads, "head_dim": config.head_dim}
        room = {"page_count": pages, "block_tokens": block_tokens}
        self._cache = PagedCache(**sizes, **room, dtype=dtype, device=self._model.device)
        self._whole = Whole(self._model, self._cache)

    def whole(self) -> _core.DecoderStep | None:
        """The step as one call into the core; None where it has none."""
        return self._whole.step()

    def __call__(self, batch: RaggedBatch, rows: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of some rows of a batch, under no adapter."""
        count = len(batch.lengths)
        none = torch.full((count,), -1, dtype=torch.int32, device=batch.tokens.device)
        batch = dataclasses.replace(batch, adapter=none, host_adapter=(-1,) * count)
        return next_logits(batch, rows, self._cache, self._model)


def check(loaded: LoadedModel, draft: LoadedModel, context_tokens: int) -> None:
    """Raises InputError when the second model cannot make drafts for the first."""
    ours, theirs = loaded.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise InputError(
            f"draft: expected a model with a vocabulary of {ours:,} tokens, got {draft.path.name} with {theirs:,}",
            "a draft comes from the same family",
        )
    mine, its = loaded.tokenizer, draft.tokenizer
    if mine.hash != its.hash:
        for number in range(ours):
            if mine.token_of(number) != its.token_of(number):
                raise InputError(
                    f"draft: expected the model's own tokens, got {its.token_of(number)!r} for token {number} in "
                    f"{draft.path.name} and {mine.token_of(number)!r} in {loaded.path.name}",
                    "a draft comes from the same family",
                )
    if draft.config.context_length < context_tokens:
        raise InputError(
            f"draft: expected a model for {context_tokens:,} tokens, got {draft.path.name} for "
            f"{draft.config.context_length:,}",
            f"--context {draft.config.context_length} fits both",
        )
