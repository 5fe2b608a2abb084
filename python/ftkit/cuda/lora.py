"""Launches of several adapters' low-rank matrices over a ragged stream; see kernels/lora_rows.py for the equations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftkit.cuda.launch import TYPES, Argument, Launch, blocks_of, expect_shapes
from ftkit.cuda.source import Variant, variant
from ftkit.errors import InputError

SIXTEEN = 16


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Whose the rows of a stream are."""

    ends: Tensor
    """i32 [segments + 1]: where each begins, from 0, and the number of rows."""
    adapters: Tensor
    """i32 [segments]: a number into `Matrices`, −1 for nobody's."""


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """One matrix an adapter, A [rank, in] or B [out, rank], in one memory such as the pool's pages."""

    pool: Tensor
    """[values], float32, bfloat16 or float16."""
    places: Tensor
    """i64 [adapters]: where each begins, in values; multiples of 16 bytes."""
    ranks: Tensor
    """i32 [adapters]; 0 for one that has nothing here."""
    width: int
    """The greatest rank, rounded up to a multiple of 16."""


def takes_tiles(x: Tensor, matrices: Matrices, columns: int) -> bool:
    """Whether the tensor core's kernels take x [rows, in], of adapters that make `columns` numbers a row."""
    known = x.dtype == torch.bfloat16 and matrices.pool.dtype in (torch.float32, torch.bfloat16)
    return known and x.shape[1] % 16 == 0 and columns % 4 == 0


def shrink(
    launch: Launch, x: Tensor, matrices: Matrices, factors: Tensor, segments: Segments, tiles: bool = False
) -> Tensor:
    """low [rows, width] = factor · x Aᵀ in x's dtype, up to each row's rank; factors float32 [adapters].

    Raises InputError for sizes that don't agree.
    """
    _expect("lora_shrink", matrices.ranks, segments)
    expect_shapes(
        "lora_shrink", places=(matrices.places, (len(matrices.ranks),)), factors=(factors, (len(matrices.ranks),))
    )
    whole = SIXTEEN if tiles else 8
    if x.shape[1] % whole:
        raise InputError(f"lora_shrink: x: expected a multiple of {whole} columns, got {x.shape[1]}")
    low, (rows, columns) = x.new_empty(x.shape[0], matrices.width), x.shape
    if not low.numel() or not columns:
        return low.zero_()
    count = len(segments.adapters)
    tensors: list[Argument] = [x, matrices.pool, matrices.places, matrices.ranks, factors]
    arguments = [*tensors, segments.ends, segments.adapters, low, count, columns, matrices.width]
    if tiles:
        kernel = _tiled(matrices)
        grid = (_pieces(kernel, rows, count), matrices.width // SIXTEEN)
        launch(kernel, "lora_sgmv_shrink", grid, arguments)
    else:
        kernel = _by_rows(x, matrices)
        launch(kernel, "lora_bgmv_shrink", (rows, matrices.width // (kernel.constant("THREADS") // 32)), arguments)
    return low


def expand(
    launch: Launch, low: Tensor, matrices: Matrices, segments: Segments, into: Tensor, tiles: bool = False
) -> None:
    """into [rows, out] += low Bᵀ; with `tiles`, low has zeros up to a multiple of 16 ranks, as `shrink` leaves them.

    Raises InputError for sizes that don't agree.
    """
    _expect("lora_expand", matrices.ranks, segments)
    expect_shapes(
        "lora_expand", low=(low, (into.shape[0], matrices.width)), places=(matrices.places, (len(matrices.ranks),))
    )
    if tiles and into.shape[1] % 4:
        raise InputError(f"lora_expand: into: expected a multiple of 4 columns, got {into.shape[1]}")
    rows, columns = into.shape
    if not into.numel() or not matrices.width:
        return
    count = len(segments.adapters)
    tensors: list[Argument] = [low, matrices.pool, matrices.places, matrices.ranks, segments.ends, segments.adapters]
    arguments = [*tensors, into, count, columns, matrices.width]
    if tiles:
        kernel = _tiled(matrices)
        grid = (_pieces(kernel, rows, count), blocks_of(columns, kernel.constant("COLUMNS")))
        launch(kernel, "lora_sgmv_expand", grid, arguments)
    else:
        kernel = _by_rows(low, matrices)
        launch(kernel, "lora_bgmv_expand", (rows, blocks_of(columns, kernel.constant("COLUMNS"))), arguments)


def gradient(launch: Launch, low: Tensor, x: Tensor, ranks: Tensor, segments: Segments) -> Tensor:
    """Σ low_tᵀ x_t over each adapter's rows, float32 [adapters, width, columns], of low [rows, width] and x
    [rows, columns] in bfloat16; zeros from an adapter's rank on. Raises InputError for sizes that don't agree."""
    _expect("lora_gradient", ranks, segments)
    expect_shapes("lora_gradient", low=(low, (x.shape[0], low.shape[1])))
    if x.shape[1] % 4 or low.shape[1] % SIXTEEN:
        got = f"{low.shape[1]} and {x.shape[1]}"
        raise InputError(f"lora_gradient: expected low of a multiple of {SIXTEEN} columns and x of 4, got {got}")
    (_, width), columns, count = low.shape, x.shape[1], len(ranks)
    if not x.numel() or not width or not count:
        return x.new_zeros(count, width, columns, dtype=torch.float32)
    out = x.new_empty(count, width, columns, dtype=torch.float32)
    kernel = variant("lora_gradient")
    grid = (blocks_of(columns, kernel.constant("COLUMNS")), count * (width // SIXTEEN))
    arguments: list[Argument] = [low, x, ranks, segments.ends, segments.adapters, out]
    launch(kernel, "lora_gradient", grid, [*arguments, len(segments.adapters), columns, width])
    return out


def _expect(operation: str, ranks: Tensor, segments: Segments) -> None:
    expect_shapes(operation, ranks=(ranks, (ranks.numel(),)), ends=(segments.ends, (len(segments.adapters) + 1,)))


def _pieces(kernel: Variant, rows: int, segments: int) -> int:
    """No less than the pieces that all segments are cut in; see ragged.cuh."""
    return rows // kernel.constant("ROWS") + segments


def _tiled(matrices: Matrices) -> Variant:
    return variant("lora_sgmv", WEIGHT=TYPES[matrices.pool.dtype])


def _by_rows(x: Tensor, matrices: Matrices) -> Variant:
    return variant("lora_bgmv", VALUE=TYPES[x.dtype], WEIGHT=TYPES[matrices.pool.dtype])
