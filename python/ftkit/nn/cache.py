"""The seam between a model and a cache of keys and values."""

from typing import Protocol

from torch import Tensor

from ftkit.nn.batch import RaggedBatch


class KVCache(Protocol):
    """Keeps keys and values of the tokens that each sequence has had before."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, *, scale: float, window: int | None
    ) -> Tensor:
        """Keeps k and v [T, key_value_heads, head_dim] of the batch's tokens, and attends to all of their sequences.

        q is [T, heads, head_dim], and so is the result. `window`: the tokens that a token sees, itself included.
        """
