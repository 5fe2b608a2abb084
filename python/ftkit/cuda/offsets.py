"""Launches of products with 4-bit codes that have offsets, which QALoRA moves; see kernels/offset_linear.py."""

import torch
from torch import Tensor

from ftkit.cuda.launch import Argument, Launch, aligned, blocks_of, expect_shapes
from ftkit.cuda.launches import Codes
from ftkit.cuda.source import variant

GROUPS = (32, 64, 128)
DECODE_ROWS, TILE = 16, 128


def takes(x: Tensor, coded: Codes) -> bool:
    """x or dy in bfloat16; codes into a table of 16 with scales and offsets in half precision; whole groups and steps
    of 64 along in, whole eights along out."""
    offsets, (rows, columns) = coded.offsets, coded.shape
    if coded.table is None or len(coded.table) != 16 or offsets is None or coded.group not in GROUPS:
        return False
    parts = (coded.codes, coded.scales, offsets)
    halves = coded.scales.dtype == offsets.dtype == torch.float16 and all(one.is_contiguous() for one in parts)
    whole = columns % max(64, coded.group) == 0 and rows % 8 == 0
    return x.dtype == torch.bfloat16 and x.ndim == 2 and halves and whole and aligned(x, coded.codes)


def matmul(launch: Launch, x: Tensor, coded: Codes) -> Tensor:
    """x [rows, in] to x Wᵀ [rows, out]. Raises InputError for sizes that don't agree."""
    (n, k), m = coded.shape, x.shape[0]
    _expect("int4_group's product", coded, x=(x, (m, k)))
    y = x.new_empty(m, n)
    arguments: list[Argument] = [x, *_parts(coded), y, m, n, k]
    if not y.numel():
        return y
    if m <= DECODE_ROWS:
        launch(variant("int4_decode", GROUP=coded.group), "int4_decode", (blocks_of(n, 32),), arguments)
    else:
        grid = (blocks_of(m, TILE), blocks_of(n, TILE))
        launch(variant("int4_forward", GROUP=coded.group), "int4_forward", grid, arguments)
    return y


def matmul_transposed(launch: Launch, dy: Tensor, coded: Codes) -> Tensor:
    """dy [rows, out] to dy W [rows, in]. Raises InputError for sizes that don't agree."""
    (n, k), m = coded.shape, dy.shape[0]
    _expect("int4_group's transposed product", coded, dy=(dy, (m, n)))
    dx = dy.new_empty(m, k)
    if dx.numel():
        grid = (blocks_of(m, TILE), blocks_of(k, TILE))
        launch(variant("int4_dx", GROUP=coded.group), "int4_dx", grid, [dy, *_parts(coded), dx, m, n, k])
    return dx


def _expect(operation: str, coded: Codes, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    (n, k), groups = coded.shape, coded.shape[0] * coded.shape[1] // coded.group
    _, _, scales, offsets = _parts(coded)
    flat = {"codes": (coded.codes.view(-1), (n * k // 2,))}
    flat |= {name: (one.view(-1), (groups,)) for name, one in (("scales", scales), ("offsets", offsets))}
    expect_shapes(operation, **tensors, **flat)


def _parts(coded: Codes) -> list[Tensor]:
    assert coded.table is not None  # `takes` asks for them
    assert coded.offsets is not None
    return [coded.codes, coded.table, coded.scales, coded.offsets]
