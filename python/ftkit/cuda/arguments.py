"""A kernel's arguments: held against its parameters, and packed as the driver takes them."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftkit.cuda.source import Kernel
from ftkit.errors import InputError

_TENSORS = {
    "float": torch.float32,
    "bf16": torch.bfloat16,
    "half": torch.float16,
    "uint8_t": torch.uint8,
    "int8_t": torch.int8,
    "int": torch.int32,
    "int64_t": torch.int64,
}
_SCALARS: dict[str, Any] = {"int": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def check(kernel: Kernel, arguments: Sequence[Tensor | int | float], device: str) -> None:
    """Raises InputError unless the arguments are what the parameters say, contiguous, on one device of this type."""
    if len(arguments) != len(kernel.parameters):
        raise InputError(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(arguments)}")
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) > 1 or any(one.type != device for one in devices):
        got = ", ".join(sorted(map(str, devices)))
        raise InputError(f"{kernel.name}: expected tensors on one {device} device, got {got}")
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        what = f"{kernel.name}: {parameter.name}"
        if parameter.pointer != isinstance(argument, Tensor):
            raise InputError(f"{what}: expected a {'tensor' if parameter.pointer else 'number'}, got {argument!r:.60}")
        if isinstance(argument, Tensor):
            if argument.dtype != _TENSORS[parameter.type]:
                raise InputError(f"{what}: expected {_TENSORS[parameter.type]}, got {argument.dtype}")
            if not argument.is_contiguous():
                raise InputError(f"{what}: expected a contiguous tensor, got strides {argument.stride()}")
        elif parameter.type == "int" and not -(2**31) <= argument < 2**31:
            raise InputError(f"{what}: expected a number of 32 bits, got {argument}")


def packed(
    kernel: Kernel, arguments: Sequence[Tensor | int | float]
) -> tuple[list[object], ctypes.Array[ctypes.c_void_p]]:
    """The values, to be kept alive during the launch, and the array of pointers to them."""
    values: list[object] = []
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        if isinstance(argument, Tensor):
            values.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            values.append(_SCALARS[parameter.type](argument))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))  # type: ignore[arg-type]
    return values, pointers
