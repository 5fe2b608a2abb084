"""What a scheme's file is made of, and the weight that holds its parts.

A scheme that converts has `scheme(option) -> Scheme` and `OPTIONS`, what may follow its name and a colon, such as the
`32` of `int8:32`. The parts of a matrix are plain tensors; `encode` makes them, `coded` says what they mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftkit._core import CodedMatrix
from ftkit.errors import InputError
from ftkit.kernels.coded_matmul import Coded, coded_dense, coded_matmul, coded_matmul_transposed
from ftkit.nn.linear import GroupOffsets, frozen_matmul

Parts = Mapping[str, Tensor]
Sides = tuple[int, int]

SLAB = 1 << 18
"""Values that are converted at a time: a multiple of every block; what is made of them on the way fits the processor's
cache and is little beside a matrix."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to hold a matrix in fewer bits."""

    name: str
    """As `--quant` takes it, option included."""
    version: int
    """Raised when `encode` gives other parts than before: what was kept on disk is made anew."""
    layout: Callable[[Sides], dict[str, tuple[tuple[int, ...], torch.dtype]]]
    """(out, in) → the parts' shapes and dtypes. Raises InputError for sides that the scheme cannot hold."""
    encode: Callable[[Tensor], dict[str, Tensor]]
    """float W [out, in], finite → parts."""
    coded: Callable[[Parts, Sides], Coded]
    """Parts and (out, in) → what they mean."""
    group: int | None = None
    """Values in a row that share one of the floats in a part called `offsets`, for a scheme with such a part."""
    blocks: Callable[[Parts], tuple[str, Tensor]] | None = None
    """Parts → the same numbers as (format, blocks uint8 [out, bytes of a row]) of GGUF, where one has them."""

    def weight(self, dense: Tensor, dtype: torch.dtype) -> "QuantizedWeight":
        """The weight that holds `dense` [out, in]. Raises InputError for values that are NaN or infinite, or none."""
        if not dense.numel():
            raise InputError(f"{self.name}: expected a matrix with values, got sides {tuple(dense.shape)}")
        self.layout((dense.shape[0], dense.shape[1]))
        return self.hold(self.encode(dense.detach()), (dense.shape[0], dense.shape[1]), dtype)

    def hold(self, parts: Parts, shape: Sides, dtype: torch.dtype) -> "QuantizedWeight":
        """The weight of these parts; `dtype` is what the model computes in."""
        return QuantizedWeight(self, parts, shape, dtype)

    def empty(self, shape: Sides, dtype: torch.dtype) -> "QuantizedWeight":
        """A weight that holds whatever memory held."""
        parts = {name: torch.empty(size, dtype=kind) for name, (size, kind) in self.layout(shape).items()}
        return self.hold(parts, shape, dtype)


class QuantizedWeight(nn.Module):
    """W as a scheme's parts, decoded for the length of a product."""

    def __init__(self, scheme: Scheme, parts: Parts, shape: Sides, dtype: torch.dtype) -> None:
        super().__init__()
        self.training = False  # until a model that trains takes it along
        self.scheme, self.shape, self.dtype = scheme, shape, dtype
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)

    @property
    def parts(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return dict(self.named_buffers(recurse=False))

    @property
    def coded(self) -> Coded:
        """What the parts mean."""
        return self.scheme.coded(self.parts, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.nbytes for part in self.parts.values())

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] to [rows, out]."""
        return frozen_matmul(x, self, lambda x: coded_matmul(x, self.coded, self.training))

    def matmul_transposed(self, dy: Tensor) -> Tensor:
        """dy [rows, out] to [rows, in]."""
        return coded_matmul_transposed(dy, self.coded)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of W by their numbers, i32 or i64 [T], to [T, in]."""
        return self.dense().index_select(0, numbers)

    def dense(self) -> Tensor:
        """W [out, in], a new tensor."""
        return coded_dense(self.coded).to(self.dtype)

    def stored(self) -> CodedMatrix | None:
        """The core's view of the parts; None for what it doesn't take."""
        return self.coded.core() if self.dtype == torch.float32 else None

    def blocks_of_file(self) -> tuple[str, Tensor] | None:
        """The parts as GGUF's blocks, where one of its formats holds the same numbers."""
        return None if self.scheme.blocks is None else self.scheme.blocks(self.parts)

    def group_offsets(self) -> GroupOffsets | None:
        """The scheme's offsets; a weight with others shares the remaining parts."""
        if self.scheme.group is None:
            return None
        parts = self.parts

        def replace(values: Tensor) -> "QuantizedWeight":
            return self.scheme.hold(parts | {"offsets": values}, self.shape, self.dtype).train(self.training)

        return GroupOffsets(self.scheme.group, parts["offsets"], replace)

    def replace_dense(self, dense: Tensor) -> "QuantizedWeight":
        """These values in the same scheme. Raises InputError for values that are NaN or infinite."""
        return self.scheme.weight(dense, self.dtype)


def finite(values: Tensor) -> Tensor:
    """The same values. Raises InputError when one is NaN or infinite."""
    # a sum is one pass; only where it isn't finite, or overflows, each value is looked at
    if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
        nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
        raise InputError(f"expected finite values, got {nan} NaN and {infinite} infinite of {values.numel()}")
    return values


def group_of(name: str, option: str, sizes: tuple[str, ...]) -> int:
    """The group's size that an option says. Raises InputError for another than `sizes`."""
    if option not in sizes:
        known = ", ".join(f"{name}:{size}" for size in sizes)
        raise InputError(f"quant: expected one of {known}, got {f'{name}:{option}'!r}")
    return int(option)


def whole_groups(name: str, shape: Sides, group: int) -> int:
    """Groups in a row. Raises InputError when they don't divide it."""
    if shape[1] % group:
        raise InputError(f"{name}: expected rows of whole groups of {group}, got {shape[1]} values", "nf4 takes any")
    return shape[1] // group


def slabs(rows: int, columns: int) -> list[slice]:
    """The rows in portions of about SLAB values."""
    step = max(1, SLAB // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
