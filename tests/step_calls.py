"""The engine's step, called as the core calls it."""

from collections.abc import Sequence

from torch import Tensor, tensor

from ftkit.engine._step import ModelStep


def hidden(step: ModelStep, tokens: Sequence[int], start: int, pages: Sequence[int], adapter: int) -> Tensor:
    """The hidden states [tokens, d] of tokens from position `start` on, of a sequence with these pages."""
    blocks = -(-(start + len(tokens)) // step.cache.block_tokens)
    batch = (tokens, range(start, start + len(tokens)), [0, len(tokens)], [adapter], pages[:blocks])
    for place, values in zip(step.workspace, batch, strict=False):  # no rows: no logits are wanted
        place[: len(values)] = tensor(values)
    return step.hidden(len(tokens), blocks, 0, (len(tokens),), (adapter,))
