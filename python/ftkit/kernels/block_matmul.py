"""Products with a matrix that is stored in blocks.

    y = x Wᵀ        dx = dy W

The `cpu` backends (in the core) dequantize a few rows of W at a time into the processor's cache and never have W whole.
A number of a product depends on its row of x or dy and on W alone: neither the rows beside it nor the threads change a
bit of it. In training it is added up in whatever order is fastest on the processor, else in the same one on all. Plain
float32 and bfloat16 are among the formats.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ftkit import _core
from ftkit.cuda import launches
from ftkit.kernels import _gpu, _training, allows, operation

_FORMATS = {name: (size, nbytes) for name, size, nbytes in _core.quant_formats()}


@operation
def block_matmul(x: Tensor, kind: str, blocks: Tensor, training: bool = False) -> Tensor:  # noqa: ARG001
    """x [rows, in] and W's blocks uint8 [out, bytes of a row] to [rows, out] in x's dtype."""
    return functional.linear(x, dequantize(kind, blocks).to(x.dtype))


def multiplies(x: Tensor, training: bool) -> bool:
    """Whether the core multiplies this: float32 always, bfloat16 in training where it has tiles for it."""
    if x.device.type != "cpu" or not allows("cpu"):
        return False
    return x.dtype == torch.float32 or (training and x.dtype == torch.bfloat16 and _core.multiplies_bfloat16())


def _multiplies(x: Tensor, blocks: Tensor, training: bool) -> bool:
    return x.device == blocks.device and multiplies(x, training)


@block_matmul.backend("cpu", lambda x, kind, blocks, training=False: _multiplies(x, blocks, training))  # noqa: ARG005
def _cpu(x: Tensor, kind: str, blocks: Tensor, training: bool = False) -> Tensor:
    y: Tensor = torch.ops.ftkit.block_matmul(x, kind, blocks, training)
    return y


@operation
def block_matmul_transposed(dy: Tensor, kind: str, blocks: Tensor) -> Tensor:
    """dy [rows, out] and W's blocks uint8 [out, bytes of a row] to dy W [rows, in] in dy's dtype."""
    return dy @ dequantize(kind, blocks).to(dy.dtype)


@block_matmul_transposed.backend(
    "cpu",
    lambda dy, kind, blocks: _multiplies(dy, blocks, True),  # noqa: ARG005
)
def _cpu_transposed(dy: Tensor, kind: str, blocks: Tensor) -> Tensor:
    dtype = _training.gradient_dtype(dy, blocks.shape[0] * columns_of(kind, blocks))
    dx: Tensor = torch.ops.ftkit.block_matmul_transposed(dy, kind, blocks, dtype)
    return dx.to(dy.dtype)


def dequantize(kind: str, blocks: Tensor) -> Tensor:
    """The blocks of rows, uint8 [rows, bytes of a row], as float32 [rows, columns]."""
    found: Tensor = torch.ops.ftkit.dequantize(kind, blocks)
    return found


def columns_of(kind: str, blocks: Tensor) -> int:
    """Values in a row of blocks."""
    size, nbytes = _FORMATS[kind]
    return blocks.shape[1] // nbytes * size


# What `torch.library.custom_op` does, in parts: the decorator's first call imports the compiler, which takes seconds.
_library = torch.library.Library("ftkit", "FRAGMENT")
_library.define("block_matmul(Tensor x, str kind, Tensor blocks, bool training) -> Tensor")
_library.define("block_matmul_transposed(Tensor dy, str kind, Tensor blocks, ScalarType dtype) -> Tensor")
_library.define("dequantize(str kind, Tensor blocks) -> Tensor")


def _multiply(x: Tensor, kind: str, blocks: Tensor, training: bool) -> Tensor:
    out = x.new_empty(x.shape[0], blocks.shape[0])
    _core.block_matmul(kind, blocks, x.contiguous(), out, training)
    return out


def _multiply_transposed(dy: Tensor, kind: str, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    out = dy.new_empty(dy.shape[0], columns_of(kind, blocks), dtype=dtype)
    _core.block_matmul_transposed(kind, blocks, dy.contiguous(), out)
    return out


def _widen(kind: str, blocks: Tensor) -> Tensor:
    out = torch.empty(blocks.shape[0], columns_of(kind, blocks))
    _core.dequantize(kind, blocks, out)
    return out


def _launch(kind: str, blocks: Tensor) -> Tensor:
    """Formats without a kernel, and all where kernels may not be used, are decoded by the core."""
    if kind in launches.BLOCK_FORMATS and allows("cuda"):
        return launches.block_dense(_gpu.launch, kind, blocks.contiguous(), columns_of(kind, blocks))
    return _widen(kind, blocks.cpu()).to(blocks.device)


_gpu.implement("dequantize", _launch)
_library.impl("block_matmul", _multiply, "CPU")
_library.impl("block_matmul_transposed", _multiply_transposed, "CPU")
_library.impl("dequantize", _widen, "CPU")
torch.library.register_fake(
    "ftkit::block_matmul", lambda x, _kind, blocks, _training: x.new_empty(x.shape[0], blocks.shape[0]), lib=_library
)
torch.library.register_fake(
    "ftkit::block_matmul_transposed",
    lambda dy, kind, blocks, dtype: dy.new_empty(dy.shape[0], columns_of(kind, blocks), dtype=dtype),
    lib=_library,
)
torch.library.register_fake(
    "ftkit::dequantize",
    lambda kind, blocks: blocks.new_empty((blocks.shape[0], columns_of(kind, blocks)), dtype=torch.float32),
    lib=_library,
)
