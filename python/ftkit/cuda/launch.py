"""What launches share: the protocol that runs a kernel, the types that kernels know, sizes of grids."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ftkit.cuda.source import Variant
from ftkit.errors import InputError

Argument = Tensor | int | float
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half", torch.uint8: "uint8_t"}
"""What a dtype is called in sources."""


class Launch(Protocol):
    """Runs a kernel of a variant on (x, y) blocks."""

    def __call__(self, variant: Variant, name: str, grid: Sequence[int], arguments: Sequence[Argument], /) -> None: ...


def blocks_of(count: int, each: int) -> int:
    """How many blocks of `each` there are in `count`."""
    return -(-count // each)


def aligned(*tensors: Tensor) -> bool:
    """Whether all start at a multiple of 16 bytes of what was allocated: accesses are as wide."""
    return all(one.storage_offset() * one.element_size() % 16 == 0 for one in tensors)


def expect_shapes(operation: str, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raises InputError unless each tensor has its shape: kernels go by the sizes that they are told."""
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != shape:
            raise InputError(f"{operation}: {name}: expected the shape {list(shape)}, got {list(tensor.shape)}")
