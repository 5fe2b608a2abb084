"""Launches on a GPU: machine code from the cache, on torch's current stream, through NVIDIA's driver.

`Driver` takes the driver's functions as `cuda.bindings.driver` has them, so that tests give it others.
"""

import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftkit.cuda.arguments import check, packed
from ftkit.cuda.compiler import compiler_version, cubin
from ftkit.cuda.launches import Argument
from ftkit.cuda.source import Variant
from ftkit.errors import FtkitError, InputError

_GREATEST_GRID = (2**31 - 1, 65535)
_REFERENCE = "FTKIT_KERNELS=reference computes the same with torch's own kernels"


class Driver:
    """The driver's functions, and what was loaded through them."""

    def __init__(self, api: Any, device_type: str, stream_of: Callable[[torch.device], int]) -> None:
        """Raises InputError for a driver that doesn't start or is older than the compiler."""
        self._api, self._device_type, self._stream_of = api, device_type, stream_of
        self._functions: dict[tuple[Variant, str, torch.device], Any] = {}
        try:
            self._call("cuInit", 0)
            (self.version,) = self._call("cuDriverGetVersion")
        except (FtkitError, RuntimeError) as error:
            raise InputError(f"CUDA kernels: expected a driver and a GPU, got none ({error})", _REFERENCE) from error
        needed = compiler_version()[0]
        if self.version // 1000 < needed:
            got = f"{self.version // 1000}.{self.version % 1000 // 10}"
            raise InputError(
                f"CUDA kernels: expected a driver for CUDA {needed} or newer, got one for {got}",
                f"update NVIDIA's driver, or install a torch that is built for CUDA {got}; {_REFERENCE}",
            )

    def launch(self, variant: Variant, name: str, grid: Sequence[int], arguments: Sequence[Argument], /) -> None:
        """Puts kernel `name` on torch's current stream, over (x, y) blocks.

        Raises InputError for arguments that aren't the kernel's, and for a GPU that is too old.
        """
        kernel = variant.kernels()[name]
        check(kernel, arguments, self._device_type)
        x, y = (*grid, 1)[:2]
        if x > _GREATEST_GRID[0] or y > _GREATEST_GRID[1]:
            raise InputError(f"{name}: expected a grid of at most {_GREATEST_GRID} blocks, got {(x, y)}")
        device = next(one.device for one in arguments if isinstance(one, Tensor))
        function = self._function(variant, name, device)
        kept, pointers = packed(kernel, arguments)
        places = ctypes.addressof(pointers)
        stream = self._stream_of(device)
        self._call("cuLaunchKernel", function, x, y, 1, kernel.threads, 1, 1, 0, stream, places, 0)
        del kept  # until here: the driver copies arguments when it launches

    def architecture(self, device: torch.device) -> str:
        """Such as sm_90."""
        major, minor = (self._attribute(device, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        return f"sm_{major}{minor}"

    def gigahertz(self, device: torch.device) -> float:
        """The clock's greatest rate."""
        return self._attribute(device, "CLOCK_RATE") / 1e6

    def _attribute(self, device: torch.device, name: str) -> int:
        (handle,) = self._call("cuDeviceGet", device.index or 0)
        attribute = getattr(self._api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call("cuDeviceGetAttribute", attribute, handle)[0])

    def _function(self, variant: Variant, name: str, device: torch.device) -> Any:
        key = (variant, name, device)
        if key not in self._functions:
            code = cubin(variant, self.architecture(device), str(self.version))
            (module,) = self._call("cuModuleLoadData", code)
            for each in variant.kernels():
                (self._functions[variant, each, device],) = self._call("cuModuleGetFunction", module, each.encode())
        return self._functions[key]

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        result, *values = getattr(self._api, name)(*arguments)
        if int(result):
            raise FtkitError(f"CUDA's {name}: expected success, got {getattr(result, 'name', result)}")
        return tuple(values)


@functools.cache
def driver() -> Driver:
    """The machine's. Raises InputError where there is none."""
    try:
        api = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise InputError(
            "CUDA kernels: expected the package cuda-bindings, got none",
            f"torch's CUDA wheel brings it; or: pip install cuda-bindings; {_REFERENCE}",
        ) from error
    return Driver(api, "cuda", lambda device: torch.cuda.current_stream(device).cuda_stream)


def launch(variant: Variant, name: str, grid: Sequence[int], arguments: Sequence[Argument], /) -> None:
    """Launches on the machine's GPU, in the context of the tensors' device."""
    device = next(one.device for one in arguments if isinstance(one, Tensor))
    with torch.cuda.device(device):
        driver().launch(variant, name, grid, arguments)
