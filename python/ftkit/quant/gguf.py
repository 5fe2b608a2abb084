"""The blocks of a GGUF file as they stand in it: memory-mapped, dequantized when they are used.

    y = x Wᵀ,  dx = dy W,  W [out, in] dequantized for the length of one product

W is never kept: a model takes its file's size, pages of the file are shared by all processes that map it, and what is
computed is, to the bit, what the same file computes once it is dequantized whole. An embedding dequantizes the rows
that are asked for, a product a few rows at a time.

Block formats are those of `ftkit list quant`; a row of W is a row of whole blocks.
"""

import ctypes
import mmap
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ftkit import _core
from ftkit.errors import InputError
from ftkit.kernels.block_matmul import block_matmul, block_matmul_transposed, dequantize
from ftkit.nn.linear import GroupOffsets, Weight, frozen_matmul

_FORMATS = {name: (size, nbytes) for name, size, nbytes in _core.quant_formats()}
_OFFSETS = {"q4_1": 2, "q5_1": 2}
"""The formats with a half-precision offset, and the byte of a block where it begins."""


class GgufWeight(nn.Module):
    """W as rows of blocks."""

    blocks: Tensor

    def __init__(self, blocks: Tensor, kind: str, dtype: torch.dtype, *, mapped: bool = False) -> None:
        """`blocks`: uint8 [out, bytes of a row] on the CPU; `kind`: their format, such as `q4_1`.

        `dtype` is what the model computes in. `mapped` blocks are a file's: they are no part of the module's state.
        """
        super().__init__()
        self.training = False  # until a model that trains takes it along
        size, nbytes = _FORMATS[kind]
        if blocks.shape[1] % nbytes:
            raise InputError(f"{kind}: expected rows of whole blocks of {nbytes} bytes, got {blocks.shape[1]} bytes")
        self.kind, self.dtype = kind, dtype
        self.columns = blocks.shape[1] // nbytes * size
        self.mapped, self.streamed = mapped, False
        self._offsets: Tensor | None = None
        if mapped:
            self.blocks = blocks
        else:
            self.register_buffer("blocks", blocks, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.blocks.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.blocks.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] to [rows, out]."""
        return frozen_matmul(x, self, lambda x: self._let_go(block_matmul(x, self.kind, self.blocks, self.training)))

    def matmul_transposed(self, dy: Tensor) -> Tensor:
        """dy [rows, out] to [rows, in]."""
        return self._let_go(block_matmul_transposed(dy, self.kind, self.blocks))

    def _let_go(self, product: Tensor) -> Tensor:
        """The product; where the weight is streamed, its pages go: the file has them."""
        if self.streamed:
            self.let_go()
        return product

    def let_go(self) -> None:
        """Gives the pages of mapped blocks back to the system; the file has them."""
        address, page = self.blocks.data_ptr(), mmap.PAGESIZE
        start, end = -(-address // page) * page, (address + self.blocks.nbytes) // page * page
        if self.mapped and end > start:  # of other memory the values would be gone
            _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of W by their numbers, i32 or i64 [T], to [T, in]."""
        return dequantize(self.kind, self.blocks.index_select(0, numbers)).to(self.dtype)

    def dense(self) -> Tensor:
        """W [out, in], a new tensor."""
        return dequantize(self.kind, self.blocks).to(self.dtype)

    def stored(self) -> tuple[str, Tensor] | None:
        """The blocks as they are."""
        return (self.kind, self.blocks) if self.blocks.device.type == "cpu" else None

    def blocks_of_file(self) -> tuple[str, Tensor] | None:
        """The blocks as they are."""
        return self.kind, self.blocks

    def group_offsets(self) -> GroupOffsets | None:
        """The offsets of Q4_1's and Q5_1's blocks; a weight with others is a copy of the blocks."""
        if self.kind not in _OFFSETS:
            return None
        size, nbytes = _FORMATS[self.kind]
        start = _OFFSETS[self.kind]

        def of(blocks: Tensor) -> Tensor:
            return blocks.view(len(blocks), -1, nbytes)[..., start : start + 2].view(torch.float16).squeeze(2)

        if self._offsets is None:  # viewed once: what counts a step's memory would take each view for the whole file
            self._offsets = of(self.blocks)

        def replace(values: Tensor) -> "GgufWeight":
            blocks = self.blocks.clone()
            of(blocks).copy_(values)
            return GgufWeight(blocks, self.kind, self.dtype).train(self.training)

        return GroupOffsets(size, self._offsets, replace)

    def replace_dense(self, dense: Tensor) -> "GgufWeight":
        """These values in the same format. Raises InputError for values that are not finite or too large for it."""
        blocks = torch.empty_like(self.blocks)
        _core.quantize(self.kind, dense.detach().float().contiguous(), blocks)
        return GgufWeight(blocks, self.kind, self.dtype)


def stream(weights: Iterable[Weight]) -> None:
    """Lets go of each mapped matrix after every product with it, so that a model takes little more memory than its
    largest matrix, however large it is; the system reads the file again as far as it has no room to remember it."""
    for weight in weights:
        if isinstance(weight, GgufWeight) and weight.mapped and _madvise is not None:
            weight.streamed = True
            weight.let_go()


_madvise: Any = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None
