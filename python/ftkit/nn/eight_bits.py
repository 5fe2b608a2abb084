"""A frozen matrix whose products in training round both sides to 8 bits; everywhere else it is what it was.

    y ≈ x Wᵀ,  dx ≈ dy W;   x, dy and W rounded to whole numbers in −127..127 with a scale for each 32 values of a row

Sums of products are whole numbers and exact, so the rounding is all that is lost: about 0.7 % of a product. W is held
twice more, by rows and by columns, 1.1 bytes a value each. Adapters, norms, attention and the loss are not touched,
and whoever evaluates or serves uses the matrix itself.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
2017, arXiv 1712.05877; scales of blocks as in GGUF's Q8_0.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ftkit._core import CodedMatrix, PackedMatrix, quantize
from ftkit.nn.linear import DenseWeight, GroupOffsets, Linear, Weight, frozen_matmul

BLOCK = 32
_BLOCK_BYTES = 34


class EightBitProducts(nn.Module):
    """A weight around another one. While `training` and not `exact`, its products are rounded."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight = weight
        self.exact = False
        dense = weight.dense()
        # a plan's weights have no values
        self._by_rows = None if isinstance(dense, FakeTensor) else _pack(dense)
        self._by_columns = None if isinstance(dense, FakeTensor) else _pack(dense.T)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix itself."""
        return self.weight.nbytes

    @property
    def _rounds(self) -> bool:
        return self.training and not self.exact

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] to [rows, out]."""
        if not self._rounds or x.dtype != torch.float32:
            return self.weight.matmul(x)
        return frozen_matmul(x, self, lambda x: _product(x, self._by_rows, self.shape[0]))

    def matmul_transposed(self, dy: Tensor) -> Tensor:
        """dy [rows, out] to [rows, in]."""
        if not self._rounds or dy.dtype != torch.float32:
            return self.weight.matmul_transposed(dy)
        return _product(dy, self._by_columns, self.shape[1])

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of W by their numbers, i32 or i64 [T], to [T, in]; exact."""
        return self.weight.rows(numbers)

    def dense(self) -> Tensor:
        """W itself."""
        return self.weight.dense()

    def stored(self) -> tuple[str, Tensor] | CodedMatrix | PackedMatrix | None:
        """The matrix itself; none while products are rounded."""
        return None if self._rounds else self.weight.stored()

    def blocks_of_file(self) -> tuple[str, Tensor] | None:
        """Those of the matrix itself."""
        return self.weight.blocks_of_file()

    def group_offsets(self) -> GroupOffsets | None:
        """Those of the matrix itself."""
        return self.weight.group_offsets()

    def replace_dense(self, dense: Tensor) -> Weight:
        """As the matrix itself holds it."""
        return self.weight.replace_dense(dense)


def packed_bytes(shape: tuple[int, int]) -> int:
    """Bytes that both packed forms of a matrix take."""
    tiles = [(-(-rows // 16) * 16) * columns // BLOCK * (BLOCK + 2) for rows, columns in (shape, shape[::-1])]
    return sum(tiles)


def takes(shape: tuple[int, int]) -> bool:
    """Whether both of a matrix' products can be rounded: its sides are whole blocks."""
    return not any(side % BLOCK for side in shape)


def in_eight_bits(layers: Iterable[Linear]) -> list[EightBitProducts]:
    """Puts the weights of layers that it can be done to into 8 bits, for training; those that it was done to."""
    found = []
    for layer in layers:
        trained = isinstance(layer.weight, DenseWeight) and layer.weight.tensor.requires_grad
        if takes(layer.shape) and not trained:
            layer.weight = EightBitProducts(layer.weight)
            found.append(layer.weight)
    return found


def _pack(dense: Tensor) -> PackedMatrix:
    rows, columns = dense.shape
    blocks = torch.empty(rows, columns // BLOCK * _BLOCK_BYTES, dtype=torch.uint8)
    quantize("q8_0", dense.float().contiguous(), blocks)
    packed = PackedMatrix.of("q8_0", blocks)
    assert packed is not None
    return packed


def _product(x: Tensor, packed: PackedMatrix | None, width: int) -> Tensor:
    y = x.new_empty(x.shape[0], width)
    if packed is not None:
        packed.matmul(x.contiguous(), y)
    return y
