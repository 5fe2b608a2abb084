"""For each operation: which kernel computes it, over how many blocks, with which arguments.

Every function takes `launch`, which runs a kernel: the driver's on a GPU, the emulator's in tests. Outputs are torch's.
A function is only for arguments that its `takes_…` says true of.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ftkit.cuda.source import Variant, variant

Argument = Tensor | int | float
GEMV_ROWS, DECODE_ROWS = 4, 16
STEP = 64
"""Values of one scale, and of one step of the tensor core's kernels."""
TILE = 128
"""Rows, and columns, of the result that a block of the tiled kernels makes."""
BLOCK_FORMATS = ("q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k")
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half", torch.uint8: "uint8_t"}


class Launch(Protocol):
    """Runs a kernel of a variant on (x, y) blocks."""

    def __call__(self, variant: Variant, name: str, grid: Sequence[int], arguments: Sequence[Argument], /) -> None: ...


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


def blocks_of(count: int, each: int) -> int:
    """How many blocks of `each` there are in `count`."""
    return -(-count // each)


def aligned(*tensors: Tensor) -> bool:
    """Whether all start at a multiple of 16 bytes of what was allocated: accesses are as wide."""
    return all(one.storage_offset() * one.element_size() % 16 == 0 for one in tensors)


def takes_dense(coded: Codes) -> bool:
    """4-bit codes into a table, or int8; groups of multiples of 8; offsets in half precision."""
    four = coded.table is not None and len(coded.table) == 16
    known = four or (coded.table is None and coded.codes.dtype == torch.int8)
    offsets = coded.offsets is None or coded.offsets.dtype == torch.float16
    return known and offsets and coded.group % 8 == 0 and coded.scales.dtype in _TYPES and aligned(coded.codes)


def dense(launch: Launch, coded: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out, in] in float32, bfloat16 or float16."""
    out = torch.empty(coded.shape, dtype=dtype, device=coded.codes.device)
    kernel = variant(
        "dequant_coded",
        TABLE=0 if coded.table is None else len(coded.table),
        SCALE=_TYPES[coded.scales.dtype],
        OFFSETS=int(coded.offsets is not None),
        OUT=_TYPES[dtype],
    )
    if count := out.numel():
        grid = (blocks_of(count, kernel.constant("THREADS") * kernel.constant("EACH")),)
        launch(
            kernel,
            "dequant_coded",
            grid,
            [*_codes(coded), _or_none(coded.offsets, torch.float16, coded), out, count, coded.group],
        )
    return out


def block_dense(launch: Launch, kind: str, blocks: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks uint8 [rows, bytes of a row] of a format of `BLOCK_FORMATS` to [rows, columns]."""
    out = torch.empty(blocks.shape[0], columns, dtype=dtype, device=blocks.device)
    kernel = variant("dequant_blocks", FORMAT=kind.upper(), OUT=_TYPES[dtype])
    if count := out.numel():
        launch(kernel, "dequant_blocks", (blocks_of(count, kernel.constant("THREADS") * 4),), [blocks, out, count])
    return out


def takes_matmul(x: Tensor, coded: Codes) -> bool:
    """4-bit codes; up to 4 rows with any group of whole eights, more of them as NF4 in bfloat16."""
    columns = coded.shape[1]
    if coded.table is None or len(coded.table) != 16 or not takes_dense(coded) or columns % coded.group:
        return False
    return (x.dtype in _TYPES and x.shape[0] <= GEMV_ROWS and aligned(x)) or _takes_tiles(x, coded)


def takes_transposed(dy: Tensor, coded: Codes) -> bool:
    """4-bit codes with a table as NF4's, and dy in bfloat16."""
    return coded.table is not None and len(coded.table) == 16 and _takes_tiles(dy, coded)


def _takes_tiles(x: Tensor, coded: Codes) -> bool:
    rows, columns = coded.shape
    plain = coded.offsets is None and coded.scales.dtype in (torch.uint8, torch.float32)
    sizes = coded.group == STEP and columns % STEP == 0 and rows % 8 == 0
    return x.dtype == torch.bfloat16 and plain and sizes and aligned(x, coded.codes)


def matmul(launch: Launch, x: Tensor, coded: Codes, low: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """x [rows, in] to x Wᵀ (+ low Bᵀ) [rows, out] in x's dtype; low [rows, rank], b [out, rank]."""
    (n, k), m = coded.shape, x.shape[0]
    y = x.new_empty(m, n)
    rank = 0 if low is None else low.shape[1]
    scale = _TYPES[coded.scales.dtype]
    if not y.numel():
        return y
    if m > DECODE_ROWS:
        low, b = _sixteens(low, 1), _sixteens(b, 1)
        rank = 0 if low is None else low.shape[1]
    if m <= GEMV_ROWS:
        offsets = _or_none(coded.offsets, torch.float16, coded)
        added = [_or_none(low, torch.float32, coded), _or_none(b, x.dtype, coded)]
        macros = {"ROWS": m, "VALUE": _TYPES[x.dtype], "GROUP": coded.group, "OFFSETS": int(coded.offsets is not None)}
        kernel = variant("nf4_gemv", **macros, SCALE=scale)
        grid = (blocks_of(n, kernel.constant("THREADS") // 32),)
        launch(kernel, "nf4_gemv", grid, [x, *_codes(coded), offsets, *added, y, n, k, rank])
    elif m <= DECODE_ROWS:
        added = [_or_none(low, torch.float32, coded), _or_none(b, x.dtype, coded)]
        arguments: list[Argument] = [x, *_codes(coded), *added, y, m, n, k, rank]
        launch(variant("nf4_decode", SCALE=scale), "nf4_decode", (blocks_of(n, 32),), arguments)
    else:
        added = [_or_none(low, x.dtype, coded), _or_none(b, x.dtype, coded)]
        arguments = [x, *_codes(coded), *added, y, m, n, k, rank]
        kernel = variant("nf4_lora_forward", SCALE=scale)
        launch(kernel, "nf4_lora_forward", (blocks_of(m, TILE), blocks_of(n, TILE)), arguments)
    return y


def matmul_transposed(
    launch: Launch, dy: Tensor, coded: Codes, dlow: Tensor | None = None, a: Tensor | None = None
) -> Tensor:
    """dy [rows, out] to dy W (+ dlow A) [rows, in]; dlow [rows, rank], a [rank, in]."""
    (n, k), m = coded.shape, dy.shape[0]
    dx = dy.new_empty(m, k)
    if not dx.numel():
        return dx
    dlow, a = _sixteens(dlow, 1), _sixteens(a, 0)
    added = [_or_none(dlow, dy.dtype, coded), _or_none(a, dy.dtype, coded)]
    arguments: list[Argument] = [dy, *_codes(coded), *added, dx, m, n, k, 0 if dlow is None else dlow.shape[1]]
    kernel = variant("nf4_lora_dx", SCALE=_TYPES[coded.scales.dtype])
    launch(kernel, "nf4_lora_dx", (blocks_of(m, TILE), blocks_of(k, TILE)), arguments)
    return dx


def rms_norm(launch: Launch, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x [rows, d] to (y, 1 / √(mean(x²) + ε) float32 [rows])."""
    y, scales = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    if x.numel():
        kernel = variant("rms_norm", VALUE=_TYPES[x.dtype])
        launch(kernel, "rms_norm_forward", (x.shape[0],), [x, weight, y, scales, x.shape[1], epsilon])
    return y, scales


def rms_norm_dx(launch: Launch, dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """The gradient in x."""
    dx = torch.empty_like(x)
    if x.numel():
        kernel = variant("rms_norm", VALUE=_TYPES[x.dtype])
        launch(kernel, "rms_norm_dx", (x.shape[0],), [dy, x, weight, scales, dx, x.shape[1]])
    return dx


def rms_norm_dweight(launch: Launch, dy: Tensor, x: Tensor, scales: Tensor) -> Tensor:
    """The gradient in the weight, float32 [d]."""
    dweight = x.new_zeros(x.shape[1], dtype=torch.float32)
    if x.numel():
        kernel = variant("rms_norm", VALUE=_TYPES[x.dtype])
        grid = (blocks_of(x.shape[1], kernel.constant("COLUMNS")),)
        launch(kernel, "rms_norm_dweight", grid, [dy, x, scales, dweight, *x.shape])
    return dweight


def swiglu(launch: Launch, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    y = torch.empty_like(gate)
    if count := y.numel():
        kernel = variant("swiglu", VALUE=_TYPES[gate.dtype])
        launch(kernel, "swiglu_forward", (blocks_of(count, 8 * kernel.constant("THREADS")),), [gate, up, y, count])
    return y


def swiglu_backward(launch: Launch, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients in gate and up."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if count := dy.numel():
        kernel = variant("swiglu", VALUE=_TYPES[gate.dtype])
        grid = (blocks_of(count, 8 * kernel.constant("THREADS")),)
        launch(kernel, "swiglu_backward", grid, [dy, gate, up, dgate, dup, count])
    return dgate, dup


def rope(launch: Launch, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x [tokens, heads, head_dim] turned by the angles [tokens, head_dim / 2], or turned back."""
    y = torch.empty_like(x)
    if x.numel():
        tokens, heads, size = x.shape
        kernel = variant("rope", VALUE=_TYPES[x.dtype])
        grid = (blocks_of(x.numel() // 16, kernel.constant("THREADS")),)
        launch(kernel, "rope", grid, [x, cos, sin, y, tokens, heads, size // 2, -1.0 if back else 1.0])
    return y


def cross_entropy(launch: Launch, logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """logits [rows, V] and targets i64 [rows] to losses float32 [rows], and the gradient where one is asked for."""
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    slope = torch.empty_like(logits) if gradient else logits.new_empty(0)
    if logits.numel():
        kernel = variant("cross_entropy", VALUE=_TYPES[logits.dtype], GRADIENT=int(gradient))
        launch(kernel, "cross_entropy", (len(targets),), [logits, targets, losses, slope, logits.shape[1]])
    return losses, slope if gradient else None


def takes_attention(q: Tensor, pages: Tensor) -> bool:
    """Heads of a multiple of 64 values, q and pages of one type that kernels know."""
    known = q.dtype in _TYPES and q.dtype == pages.dtype and q.shape[-1] % 64 == 0
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
    """q [T, heads, head_dim] over pages [pages, layers, 2, block_tokens, key_value_heads, head_dim] to q's shape."""
    y = torch.empty_like(q)
    if q.numel():
        (sequences, blocks), (tokens, heads, size) = block_table.shape, q.shape
        block_tokens, key_value_heads = pages.shape[3:5]
        kernel = variant("paged_attention", VALUE=_TYPES[q.dtype], HEAD=size)
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


def adamw_8bit(
    launch: Launch,
    weight: Tensor,
    gradient: Tensor,
    mean: Sequence[Tensor],
    square: Sequence[Tensor],
    factors: Sequence[float],
) -> None:
    """Moves in place; a state is (codes, greatest, map, edges), the factors β₁, β₂, ε, rate, correction, kept."""
    beta1, beta2, *rest = factors
    if count := weight.numel():
        kernel = variant("adamw_8bit")
        grid = (blocks_of(count, kernel.constant("THREADS")),)
        betas = [beta1, 1 - beta1, beta2, 1 - beta2]
        launch(kernel, "adamw_8bit", grid, [weight, gradient, *mean, *square, count, *betas, *rest])


def _codes(coded: Codes) -> list[Tensor]:
    """What all kernels take of a coded matrix; empty where there is none."""
    nested = coded.nested
    scales = [coded.scales.view(-1)]
    scales += (
        [coded.scales.new_empty(0, dtype=torch.float32)] * 3
        if nested is None
        else [nested.map, nested.greatest, nested.mean]
    )
    return [coded.codes.view(torch.uint8), _or_none(coded.table, torch.float32, coded), *scales]


def _sixteens(tensor: Tensor | None, axis: int) -> Tensor | None:
    """With zeros up to a whole number of sixteens along the rank."""
    if tensor is None or tensor.shape[axis] % 16 == 0:
        return tensor
    missing = -tensor.shape[axis] % 16
    return functional.pad(tensor, (0, missing) if axis == 1 else (0, 0, 0, missing))


def _or_none(tensor: Tensor | None, dtype: torch.dtype, coded: Codes) -> Tensor:
    """The tensor in this dtype; an empty one for none."""
    return coded.codes.new_empty(0, dtype=dtype) if tensor is None else tensor.to(dtype)
