"""Matrices of codes into a table, with a scale and perhaps an offset for each group: dequantized, or multiplied.

    w = table[code] · scale_g (+ offset_g)

What schemes convert to is described by `Coded`, whatever they are called, so the operations know none of them. The
`cpu` backend (in the core) takes rows of whole groups; a product without gradients dequantizes a few rows at a time
into the processor's cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftkit import _core
from ftkit.cuda import launches
from ftkit.kernels import _gpu, _training, operation
from ftkit.kernels.block_matmul import multiplies


@dataclass(frozen=True, kw_only=True)
class Nested:
    """How codes of 8 bits stand for scales: map[code] · greatest + mean, a greatest for each 256 of them."""

    map: Tensor
    """float32 [256]"""
    greatest: Tensor
    """float32 [⌈groups / 256⌉]"""
    mean: Tensor
    """float32 [1]"""


@dataclass(frozen=True, kw_only=True)
class Coded:
    """W [out, in]; groups go over the flattened matrix, and the last one may be short."""

    shape: tuple[int, int]
    """(out, in)"""
    codes: Tensor
    """uint8, two codes a byte, the first in the high half; or [out, in] in a type of 8 bits that is its own table."""
    table: Tensor | None
    """float32 [16]: what 4-bit codes mean."""
    group: int
    """Values that share a scale."""
    scales: Tensor
    """float32 or float16 [groups], in any shape; codes uint8 [groups] where they are nested."""
    nested: Nested | None = None
    offsets: Tensor | None = None
    """float32 or float16 [groups], in any shape."""

    def core(self) -> _core.CodedMatrix | None:
        """The core's view of it; None for what the core doesn't take."""
        return _matrix(*arguments(self)) if takes(self) else None


@operation
def coded_dense(coded: Coded) -> Tensor:
    """W, float32 [out, in], a new tensor."""
    count = coded.shape[0] * coded.shape[1]
    if coded.table is None:
        out = coded.codes.float().view(-1)
    else:
        table = coded.table.to(coded.codes.device)
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # [256, 2]: what a byte stands for
        out = functional.embedding(coded.codes.view(-1).int(), pairs).view(-1)[:count]
    whole = count - count % coded.group
    scales = _scales(coded)
    out[:whole].view(-1, coded.group).mul_(scales[: whole // coded.group].unsqueeze(1))
    if whole < count:
        out[whole:].mul_(scales[-1])
    if coded.offsets is not None:
        out.view(-1, coded.group).add_(coded.offsets.float().view(-1, 1))
    return out.view(coded.shape)


def _scales(coded: Coded) -> Tensor:
    """float32 [groups]"""
    if coded.nested is None:
        return coded.scales.float().view(-1)
    codes, nested = coded.scales, coded.nested
    found = functional.embedding(codes.int(), nested.map.to(codes.device).view(-1, 1)).view(-1)
    return found * nested.greatest.repeat_interleave(256)[: len(codes)] + nested.mean


@operation
def coded_matmul_transposed(dy: Tensor, coded: Coded) -> Tensor:
    """dy [rows, out] to dy W [rows, in] in dy's dtype; without gradients."""
    return dy @ coded_dense(coded).to(dy.dtype)


@operation
def coded_matmul(x: Tensor, coded: Coded, training: bool = False) -> Tensor:  # noqa: ARG001
    """x [rows, in] to x Wᵀ [rows, out] in x's dtype; without gradients.

    In training it is added up in whatever order is fastest on the processor, else in the same one on all.
    """
    return functional.linear(x, coded_dense(coded).to(x.dtype))


def takes(coded: Coded) -> bool:
    """Whether the core multiplies with it."""
    return coded.codes.device.type == "cpu" and not coded.shape[1] % coded.group and coded.group % 2 == 0


def _on_gpu(coded: Coded) -> bool:
    return coded.codes.device.type == _gpu.device_type


@coded_dense.backend("cuda", lambda coded: _on_gpu(coded) and launches.takes_dense(coded))
@coded_dense.backend("cpu", takes)
def _dense(coded: Coded) -> Tensor:
    out: Tensor = torch.ops.ftkit.coded_dense(*arguments(coded))
    return out


def _multiplies(x: Tensor, coded: Coded, training: bool) -> bool:
    return takes(coded) and multiplies(x, training)


def _takes_transposed(dy: Tensor, coded: Coded) -> bool:
    return _on_gpu(coded) and launches.takes_tiles(dy, coded)


@coded_matmul_transposed.backend("cuda", _takes_transposed)
@coded_matmul_transposed.backend("cpu", lambda dy, coded: _multiplies(dy, coded, True))
def _transposed(dy: Tensor, coded: Coded) -> Tensor:
    dtype = dy.dtype if _on_gpu(coded) else _training.gradient_dtype(dy, coded.shape[0] * coded.shape[1])
    dx: Tensor = torch.ops.ftkit.coded_matmul_transposed(dy, dtype, *arguments(coded))
    return dx.to(dy.dtype)


def _takes_matmul(x: Tensor, coded: Coded, training: bool = False) -> bool:  # noqa: ARG001
    return _on_gpu(coded) and launches.takes_matmul(x, coded)


@coded_matmul.backend("cuda", _takes_matmul)
@coded_matmul.backend("cpu", lambda x, coded, training=False: _multiplies(x, coded, training))
def _product(x: Tensor, coded: Coded, training: bool = False) -> Tensor:
    y: Tensor = torch.ops.ftkit.coded_matmul(x, training, *arguments(coded))
    return y


def arguments(coded: Coded) -> tuple[Any, ...]:
    """A coded matrix as operations take it."""
    nested = coded.nested
    more = (None, None, None) if nested is None else (nested.map, nested.greatest, nested.mean)
    return (*coded.shape, coded.codes, coded.table, coded.group, coded.scales, *more, coded.offsets)


_library = torch.library.Library("ftkit", "FRAGMENT")
_SIGNATURE = (
    "int rows, int columns, Tensor codes, Tensor? table, int group, Tensor scales, "
    "Tensor? map, Tensor? greatest, Tensor? mean, Tensor? offsets"
)
_library.define(f"coded_dense({_SIGNATURE}) -> Tensor")
_library.define(f"coded_matmul(Tensor x, bool training, {_SIGNATURE}) -> Tensor")
_library.define(f"coded_matmul_transposed(Tensor dy, ScalarType dtype, {_SIGNATURE}) -> Tensor")


def _matrix(
    rows: int,
    columns: int,
    codes: Tensor,
    table: Tensor | None,
    group: int,
    scales: Tensor,
    map: Tensor | None,
    greatest: Tensor | None,
    mean: Tensor | None,
    offsets: Tensor | None,
) -> _core.CodedMatrix:
    nested = None
    if map is not None and greatest is not None and mean is not None:
        nested = (map, greatest, float(mean))
    if table is None and codes.dtype != torch.int8:
        table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return _core.CodedMatrix(codes.view(torch.uint8), table, (rows, columns), group, scales, nested, offsets)


def _coded(
    rows: int,
    columns: int,
    codes: Tensor,
    table: Tensor | None,
    group: int,
    scales: Tensor,
    map: Tensor | None,
    greatest: Tensor | None,
    mean: Tensor | None,
    offsets: Tensor | None,
) -> Coded:
    """The other way: what `arguments` were made of."""
    nested = None
    if map is not None and greatest is not None and mean is not None:
        nested = Nested(map=map, greatest=greatest, mean=mean)
    return Coded(
        shape=(rows, columns), codes=codes, table=table, group=group, scales=scales, nested=nested, offsets=offsets
    )


coded_lora = _gpu.define(
    f"coded_lora(Tensor x, Tensor low, Tensor b, {_SIGNATURE}) -> Tensor",
    lambda x, low, b, *rest: launches.matmul(_gpu.launch, x, _coded(*rest), low, b),
    lambda x, _low, _b, rows, *_: x.new_empty(x.shape[0], rows),
)
coded_lora_dx = _gpu.define(
    f"coded_lora_dx(Tensor dy, Tensor dlow, Tensor a, {_SIGNATURE}) -> Tensor",
    lambda dy, dlow, a, *rest: launches.matmul_transposed(_gpu.launch, dy, _coded(*rest), dlow, a),
    lambda dy, _dlow, _a, _rows, columns, *_: dy.new_empty(dy.shape[0], columns),
)
_gpu.implement("coded_dense", lambda *rest: launches.dense(_gpu.launch, _coded(*rest)))


_gpu.implement("coded_matmul", lambda x, _training, *rest: launches.matmul(_gpu.launch, x.contiguous(), _coded(*rest)))
_gpu.implement(
    "coded_matmul_transposed",
    lambda dy, _dtype, *rest: launches.matmul_transposed(_gpu.launch, dy.contiguous(), _coded(*rest)),
)


def _run_dense(rows: int, columns: int, *rest: Any) -> Tensor:
    out = torch.empty(rows, columns)
    _matrix(rows, columns, *rest).dequantize(out)
    return out


def _run_matmul(x: Tensor, training: bool, rows: int, *rest: Any) -> Tensor:
    out = x.new_empty(x.shape[0], rows)
    _matrix(rows, *rest).matmul(x.contiguous(), out, training)
    return out


def _run_transposed(dy: Tensor, dtype: torch.dtype, rows: int, columns: int, *rest: Any) -> Tensor:
    out = dy.new_empty(dy.shape[0], columns, dtype=dtype)
    _matrix(rows, columns, *rest).matmul_transposed(dy.contiguous(), out)
    return out


_library.impl("coded_matmul_transposed", _run_transposed, "CPU")
_library.impl("coded_dense", _run_dense, "CPU")
_library.impl("coded_matmul", _run_matmul, "CPU")
torch.library.register_fake(
    "ftkit::coded_dense",
    lambda rows, columns, codes, *_: codes.new_empty((rows, columns), dtype=torch.float32),
    lib=_library,
)
torch.library.register_fake(
    "ftkit::coded_matmul", lambda x, _training, rows, *_: x.new_empty(x.shape[0], rows), lib=_library
)
torch.library.register_fake(
    "ftkit::coded_matmul_transposed",
    lambda dy, dtype, _rows, columns, *_: dy.new_empty(dy.shape[0], columns, dtype=dtype),
    lib=_library,
)
