"""Keys and values of many sequences in the pages of one tensor.

The pool is a single `uint8` tensor; a page of it holds `block_tokens` tokens of one sequence, for every layer:
`[layers, 2, block_tokens, key_value_heads, head_dim]`. Which page belongs to whom is decided by the core's scheduler
and comes with each batch as `block_table`; this file reads and writes where it says. With the dtype int8, a head is a
record of codes and scales (`kernels/_cache_codes.py`), about 3.6 times smaller than in float32.
"""

import math

import torch
from torch import Tensor

from ftkit.errors import InputError
from ftkit.kernels._cache_codes import encode, record_bytes
from ftkit.kernels.paged_attention import paged_attention
from ftkit.nn.batch import RaggedBatch


class PagedCache:
    """A `KVCache` over a pool of pages."""

    def __init__(
        self,
        *,
        layers: int,
        key_value_heads: int,
        head_dim: int,
        page_count: int,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Makes a pool of `page_count` pages; its memory is touched only as pages come into use.

        Raises InputError when the machine has no room for it.
        """
        self._coded = dtype == torch.int8
        size = record_bytes(head_dim) if self._coded else head_dim
        shape = (layers, 2, block_tokens, key_value_heads, size)
        page_bytes = math.prod(shape) * dtype.itemsize
        try:
            self.pool = torch.empty((page_count, page_bytes), dtype=torch.uint8, device=device)
        except RuntimeError as error:
            total = page_count * page_bytes
            raise InputError(f"cache: expected room for {total} bytes, got {error}", "make the pool smaller") from error
        self.block_tokens, self.page_count = block_tokens, page_count
        self.pages = self.pool.view(torch.uint8 if self._coded else dtype).view(page_count, *shape)
        self._route: tuple[RaggedBatch, Tensor, Tensor, Tensor, tuple[int, ...]] | None = None

    @staticmethod
    def page_bytes(
        *, layers: int, key_value_heads: int, head_dim: int, block_tokens: int = 16, dtype: torch.dtype = torch.float32
    ) -> int:
        """The bytes of a page."""
        head_bytes = record_bytes(head_dim) if dtype == torch.int8 else head_dim * dtype.itemsize
        return layers * 2 * block_tokens * key_value_heads * head_bytes

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, *, scale: float, window: int | None
    ) -> Tensor:
        """Writes k and v [T, key_value_heads, head_dim] to the pages; q [T, heads, head_dim] to the same shape."""
        table, pages, slots, totals = self._places(batch)
        if self._coded:
            k, v = encode(k), encode(v)
        self.pages[:, layer, 0].index_put_((pages, slots), k)
        self.pages[:, layer, 1].index_put_((pages, slots), v)
        return paged_attention(
            q,
            self.pages,
            table,
            batch.cu_seqlens,
            batch.positions,
            batch.lengths,
            totals,
            layer=layer,
            scale=scale,
            window=window,
        )

    def _places(self, batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """The table, each token's page and slot, and each sequence's length so far: once a batch, not once a layer."""
        if self._route is None or self._route[0] is not batch:
            table = batch.block_table
            if table is None:
                raise ValueError("expected a batch with a block table, got one without")
            positions = batch.positions.long()
            pages = table[batch.sequence, positions // self.block_tokens].long()
            totals = tuple((batch.positions[batch.last] + 1).tolist())
            self._route = (batch, table, pages, positions % self.block_tokens, totals)
        return self._route[1:]
