"""Products with activations rounded to 8 bits, in whole numbers: for serving, where one asks for them.

    y = x̂ Wᵀ,  x̂ = s a with a in -127..127 and one s = max |x| / 127 for 32 values

W is what it was; only x is rounded, which is what llama.cpp always does. The core packs the codes of W once, 16 rows
side by side: a second copy of the matrix, while the first stays in its file. Gradients go past it.
"""

import torch
from torch import Tensor, nn

from ftkit._core import PackedMatrix
from ftkit.errors import InputError
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import GroupOffsets, Weight


class PackedWeight(nn.Module):
    """Another weight, packed."""

    def __init__(self, weight: Weight, packed: PackedMatrix) -> None:
        super().__init__()
        self.exact, self.packed = weight, packed

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.exact.shape

    @property
    def nbytes(self) -> int:
        """Bytes that were packed; the exact weight is a file's, or shared with an embedding."""
        return self.packed.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in], rounded, to [rows, out]; with gradients, x as it is."""
        if torch.is_grad_enabled() or x.dtype != torch.float32:
            return self.exact.matmul(x)
        y = x.new_empty(x.shape[0], self.shape[0])
        self.packed.matmul(x.contiguous(), y)
        return y

    def matmul_transposed(self, dy: Tensor) -> Tensor:
        """dy [rows, out] to [rows, in]."""
        return self.exact.matmul_transposed(dy)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of W by their numbers, i32 or i64 [T], to [T, in]."""
        return self.exact.rows(numbers)

    def dense(self) -> Tensor:
        """W [out, in]."""
        return self.exact.dense()

    def stored(self) -> PackedMatrix:
        """What was packed."""
        return self.packed

    def blocks_of_file(self) -> tuple[str, Tensor] | None:
        """The exact weight's."""
        return self.exact.blocks_of_file()

    def group_offsets(self) -> GroupOffsets | None:
        """The exact weight's; with others it is packed anew."""
        found = self.exact.group_offsets()
        return found and GroupOffsets(found.group, found.values, lambda values: _packed(found.replace(values)))

    def replace_dense(self, dense: Tensor) -> Weight:
        """A weight of these values, not packed."""
        return self.exact.replace_dense(dense)


def round_activations(model: Decoder) -> None:
    """Packs every linear layer's matrix that is whole numbers. Raises InputError where none is."""
    count = 0
    for linear in model.linears().values():
        exact, linear.weight = linear.weight, _packed(linear.weight)
        count += linear.weight is not exact
    if not count:
        raise InputError(
            "--fast-decode: expected matrices in blocks of whole numbers, got none",
            "a .gguf file of a type such as q4_1 or q8_0 has them: ftkit export MODEL --to gguf --type q8_0",
        )


def _packed(weight: Weight) -> Weight:
    """The weight, packed where it is whole numbers."""
    stored = weight.stored()
    packed = PackedMatrix.of(*stored) if isinstance(stored, tuple) else None
    return weight if packed is None else PackedWeight(weight, packed)
