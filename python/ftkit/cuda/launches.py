"""For each operation: which kernel computes it, over how many blocks, with which arguments.

Every function takes `launch`, which runs a kernel: the driver's on a GPU, the emulator's in tests. Outputs are torch's.
A function is only for arguments that its `takes_…` says true of. Products with matrices of codes are here; `layers`,
`pages` and `lora` have the others, under this roof.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ftkit.cuda.launch import TYPES, expect_shapes
from ftkit.cuda.launch import Argument as Argument
from ftkit.cuda.launch import Launch as Launch
from ftkit.cuda.launch import aligned as aligned
from ftkit.cuda.launch import blocks_of as blocks_of
from ftkit.cuda.layers import adamw_8bit as adamw_8bit
from ftkit.cuda.layers import cross_entropy as cross_entropy
from ftkit.cuda.layers import rms_norm as rms_norm
from ftkit.cuda.layers import rms_norm_dweight as rms_norm_dweight
from ftkit.cuda.layers import rms_norm_dx as rms_norm_dx
from ftkit.cuda.layers import rope as rope
from ftkit.cuda.layers import swiglu as swiglu
from ftkit.cuda.layers import swiglu_backward as swiglu_backward
from ftkit.cuda.pages import paged_attention as paged_attention
from ftkit.cuda.pages import takes_attention as takes_attention
from ftkit.cuda.source import variant

GEMV_ROWS, DECODE_ROWS = 4, 16
DECODE_COLUMNS = 1024
"""From here on half of `coded_decode`'s warps have a part of a row to read, enough bytes in flight, and it takes fewer
rows than 5, too: a value of W costs it a third of `coded_gemv`'s instructions."""
GROUPS, STEP = (32, 64, 128), 64
"""Values of one scale, and of one step of the tensor core's kernels."""
TILE, WIDE = 128, 256
"""Rows of the result that a block of the tiled kernels makes, and columns; `coded_dx` makes 128 of these, too."""
BLOCK_FORMATS = ("q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k")


class Scales(Protocol):
    """Scales that are quantized again."""

    @property
    def map(self) -> Tensor: ...
    @property
    def greatest(self) -> Tensor: ...
    @property
    def mean(self) -> Tensor: ...


class Codes(Protocol):
    """A matrix as codes; see kernels/coded_matmul.py."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def codes(self) -> Tensor: ...
    @property
    def table(self) -> Tensor | None: ...
    @property
    def group(self) -> int: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def nested(self) -> Scales | None: ...
    @property
    def offsets(self) -> Tensor | None: ...


def takes_dense(coded: Codes) -> bool:
    """4-bit codes into a table, or int8; groups of multiples of 8; offsets in half precision."""
    four = coded.table is not None and len(coded.table) == 16
    known = four or (coded.table is None and coded.codes.dtype == torch.int8)
    offsets = coded.offsets is None or coded.offsets.dtype == torch.float16
    return known and offsets and coded.group % 8 == 0 and coded.scales.dtype in TYPES and aligned(coded.codes)


def dense(launch: Launch, coded: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out, in] in float32, bfloat16 or float16."""
    out = torch.empty(coded.shape, dtype=dtype, device=coded.codes.device)
    kernel = variant(
        "dequant_coded",
        TABLE=0 if coded.table is None else len(coded.table),
        SCALE=TYPES[coded.scales.dtype],
        OFFSETS=int(coded.offsets is not None),
        OUT=TYPES[dtype],
    )
    if count := out.numel():
        grid = (blocks_of(count, kernel.constant("THREADS") * kernel.constant("EACH")),)
        launch(
            kernel,
            "dequant_coded",
            grid,
            [*_codes(coded), out, count, coded.group],
        )
    return out


def block_dense(launch: Launch, kind: str, blocks: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks uint8 [rows, bytes of a row] of a format of `BLOCK_FORMATS` to [rows, columns]."""
    out = torch.empty(blocks.shape[0], columns, dtype=dtype, device=blocks.device)
    kernel = variant("dequant_blocks", FORMAT=kind.upper(), OUT=TYPES[dtype])
    if count := out.numel():
        launch(kernel, "dequant_blocks", (blocks_of(count, kernel.constant("THREADS") * 4),), [blocks, out, count])
    return out


def takes_matmul(x: Tensor, coded: Codes) -> bool:
    """4-bit codes; up to 4 rows with any group of whole eights, more of them by the tensor core's kernels."""
    if not _by_sixteen(coded) or not takes_dense(coded) or coded.shape[1] % coded.group:
        return False
    return (x.dtype in TYPES and x.shape[0] <= GEMV_ROWS and aligned(x)) or takes_tiles(x, coded)


def takes_tiles(x: Tensor, coded: Codes) -> bool:
    """x or dy in bfloat16, 4-bit codes; whole groups and steps of 64 along in, whole eights along out."""
    if not _by_sixteen(coded) or not takes_dense(coded) or coded.group not in GROUPS or x.ndim != 2:
        return False
    rows, columns = coded.shape
    parts = [coded.codes, coded.scales, *([] if coded.offsets is None else [coded.offsets])]
    whole = columns % max(STEP, coded.group) == 0 and rows % 8 == 0 and all(one.is_contiguous() for one in parts)
    return x.dtype == torch.bfloat16 and whole and aligned(x)


def _by_sixteen(coded: Codes) -> bool:
    return coded.table is not None and len(coded.table) == 16


def matmul(launch: Launch, x: Tensor, coded: Codes, low: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """x [rows, in] to x Wᵀ (+ low Bᵀ) [rows, out] in x's dtype; low [rows, rank], b [out, rank].

    Raises InputError for sizes that don't agree.
    """
    (n, k), m = coded.shape, x.shape[0]
    _expect("a product with codes", coded, x=(x, (m, k)))
    y = x.new_empty(m, n)
    if not y.numel():
        return y
    if m > DECODE_ROWS:
        low, b = _sixteens(low, 1), _sixteens(b, 1)
    rank = 0 if low is None else low.shape[1]
    one_by_one = m <= GEMV_ROWS and not (k >= DECODE_COLUMNS and takes_tiles(x, coded))
    kind = x.dtype if m > DECODE_ROWS else torch.float32
    added = [_or_none(low, kind, coded), _or_none(b, x.dtype, coded)]
    if one_by_one:
        kernel = variant("coded_gemv", ROWS=m, VALUE=TYPES[x.dtype], **_macros(coded))
        grid = (blocks_of(n, kernel.constant("THREADS") // 32),)
        launch(kernel, "coded_gemv", grid, [x, *_codes(coded), *added, y, n, k, rank])
    elif m <= DECODE_ROWS:
        arguments: list[Argument] = [x, *_codes(coded), *added, y, m, n, k, rank]
        launch(variant("coded_decode", **_macros(coded)), "coded_decode", (blocks_of(n, 32),), arguments)
    else:
        arguments = [x, *_codes(coded), *added, y, m, n, k, rank]
        tiles = (blocks_of(m, TILE), blocks_of(n, WIDE))
        launch(variant("coded_forward", **_macros(coded)), "coded_forward", tiles, arguments)
    return y


def matmul_transposed(
    launch: Launch, dy: Tensor, coded: Codes, dlow: Tensor | None = None, a: Tensor | None = None
) -> Tensor:
    """dy [rows, out] to dy W (+ dlow A) [rows, in]; dlow [rows, rank], a [rank, in].

    Raises InputError for sizes that don't agree.
    """
    (n, k), m = coded.shape, dy.shape[0]
    _expect("a transposed product with codes", coded, dy=(dy, (m, n)))
    dx = dy.new_empty(m, k)
    if not dx.numel():
        return dx
    dlow, a = _sixteens(dlow, 1), _sixteens(a, 0)
    added = [_or_none(dlow, dy.dtype, coded), _or_none(a, dy.dtype, coded)]
    arguments: list[Argument] = [dy, *_codes(coded), *added, dx, m, n, k, 0 if dlow is None else dlow.shape[1]]
    launch(variant("coded_dx", **_macros(coded)), "coded_dx", (blocks_of(m, TILE), blocks_of(k, TILE)), arguments)
    return dx


def _expect(operation: str, coded: Codes, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    count = coded.shape[0] * coded.shape[1]
    flat = {"codes": (coded.codes.view(-1), (count // 2,)), "scales": (coded.scales.view(-1), (count // coded.group,))}
    if coded.offsets is not None:
        flat["offsets"] = (coded.offsets.view(-1), (count // coded.group,))
    expect_shapes(operation, **tensors, **flat)


def _macros(coded: Codes) -> dict[str, object]:
    return {"SCALE": TYPES[coded.scales.dtype], "GROUP": coded.group, "OFFSETS": int(coded.offsets is not None)}


def _codes(coded: Codes) -> list[Tensor]:
    """What all kernels take of a coded matrix; empty where there is none."""
    nested = coded.nested
    scales = [coded.scales.view(-1)]
    scales += (
        [coded.scales.new_empty(0, dtype=torch.float32)] * 3
        if nested is None
        else [nested.map, nested.greatest, nested.mean]
    )
    offsets = coded.codes.new_empty(0, dtype=torch.float16) if coded.offsets is None else coded.offsets.view(-1)
    return [coded.codes.view(torch.uint8), _or_none(coded.table, torch.float32, coded), *scales, offsets]


def _sixteens(tensor: Tensor | None, axis: int) -> Tensor | None:
    """With zeros up to a whole number of sixteens along the rank."""
    if tensor is None or tensor.shape[axis] % 16 == 0:
        return tensor
    missing = -tensor.shape[axis] % 16
    return functional.pad(tensor, (0, missing) if axis == 1 else (0, 0, 0, missing))


def _or_none(tensor: Tensor | None, dtype: torch.dtype, coded: Codes) -> Tensor:
    """The tensor in this dtype; an empty one for none."""
    return coded.codes.new_empty(0, dtype=dtype) if tensor is None else tensor.to(dtype)
