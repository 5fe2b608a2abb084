"""Launches of attention over pages of the block pool."""

import torch
from torch import Tensor

from ftkit.cuda.launch import TYPES, Argument, Launch, aligned, expect_shapes
from ftkit.cuda.source import variant
from ftkit.errors import InputError


def takes_attention(q: Tensor, pages: Tensor) -> bool:
    """Heads of a multiple of 64 values, q and pages of one type that kernels know."""
    known = q.dtype in TYPES and q.dtype == pages.dtype and q.shape[-1] % 64 == 0
    return known and pages.is_contiguous() and aligned(q, pages)


def paged_attention(
    launch: Launch,
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """q [T, heads, head_dim] over pages [pages, layers, 2, block_tokens, key_value_heads, head_dim] to q's shape.

    Raises InputError for sizes that don't agree.
    """
    _expect("paged_attention", q, pages, block_table, cu_seqlens, positions, layer)
    y = torch.empty_like(q)
    if q.numel():
        (sequences, blocks), (tokens, heads, size) = block_table.shape, q.shape
        block_tokens, key_value_heads = pages.shape[3:5]
        kernel = variant("paged_attention", VALUE=TYPES[q.dtype], HEAD=size)
        numbers: list[int] = [
            sequences,
            blocks,
            heads,
            key_value_heads,
            block_tokens,
            pages.stride(0),
            layer * pages.stride(1),
        ]
        arguments: list[Argument] = [q, pages, block_table, cu_seqlens, positions, y, *numbers, scale, window or 0]
        launch(kernel, "paged_attention", (tokens, heads), arguments)
    return y


PREFILL_HEADS = (64, 80, 96, 128)


def takes_prefill(q: Tensor, pages: Tensor) -> bool:
    """q [T, heads, head_dim] and pages in bfloat16, heads of the sizes of `PREFILL_HEADS`."""
    known = q.dtype == pages.dtype == torch.bfloat16 and q.shape[-1] in PREFILL_HEADS
    return known and pages.is_contiguous() and aligned(q, pages)


def paged_prefill(
    launch: Launch,
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """As `paged_attention`, for sequences of many new tokens, whose positions rise."""
    _expect("paged_prefill", q, pages, block_table, cu_seqlens, positions, layer)
    y = torch.empty_like(q)
    if q.numel():
        (sequences, blocks), (tokens, heads, size) = block_table.shape, q.shape
        block_tokens, key_value_heads = pages.shape[3:5]
        kernel = variant("paged_prefill", HEAD=size)
        numbers: list[int] = [sequences, blocks, heads, key_value_heads, block_tokens]
        places: list[int] = [pages.stride(0), layer * pages.stride(1)]
        arguments: list[Argument] = [q, pages, block_table, cu_seqlens, positions, y, *numbers, *places]
        grid = (tokens // kernel.constant("ROWS") + sequences, heads)
        launch(kernel, "paged_prefill", grid, [*arguments, scale, window or 0])
    return y


def _expect(
    operation: str, q: Tensor, pages: Tensor, block_table: Tensor, cu_seqlens: Tensor, positions: Tensor, layer: int
) -> None:
    count, layers, _, block_tokens, key_value_heads, size = pages.shape
    expect_shapes(
        operation,
        q=(q, (*q.shape[:2], size)),
        pages=(pages, (count, layers, 2, block_tokens, key_value_heads, size)),
        cu_seqlens=(cu_seqlens, (block_table.shape[0] + 1,)),
        positions=(positions, (q.shape[0],)),
    )
    if q.shape[1] % key_value_heads or not 0 <= layer < layers:
        raise InputError(
            f"{operation}: expected heads that are a multiple of {key_value_heads} and a layer below {layers}, got "
            f"{q.shape[1]} heads and layer {layer}"
        )
