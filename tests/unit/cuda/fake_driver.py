"""NVIDIA's driver as `cuda.bindings.driver` has it, over the emulator: memory is the CPU's."""

import ctypes
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ftkit.cuda.on_cpu import Library
from ftkit.cuda.source import Variant


class FakeDriver:
    """Answers (code, value …) as the driver does; code `failing[function]` where a test says so."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1,
        CU_DEVICE_ATTRIBUTE_CLOCK_RATE=2,
    )

    def __init__(
        self, libraries: dict[Variant, Library], capability: tuple[int, int] = (8, 0), version: int = 13020
    ) -> None:
        self.libraries, self.capability, self.version = libraries, capability, version
        self.failing: dict[str, int] = {}
        self.loaded: list[bytes] = []
        self.launched: list[tuple[str, tuple[int, ...], int]] = []
        self.memory: list[Tensor] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name in self.failing:
            return lambda *_: (self.failing[name],)
        return super().__getattribute__(name)

    def cuInit(self, _flags: int) -> tuple[int]:
        return (0,)

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDeviceGetAttribute(self, attribute: int, _device: int) -> tuple[int, int]:
        return 0, (*self.capability, 1_410_000)[attribute]

    def cuModuleLoadData(self, code: bytes) -> tuple[int, bytes]:
        assert code.startswith(b"\x7fELF")
        self.loaded.append(code)
        return 0, code

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[int, str]:
        assert name in module, "the machine code has no kernel of this name"
        return 0, name.decode()

    def cuLaunchKernel(self, function: str, *numbers: int) -> tuple[int]:
        *sizes, shared_bytes, stream, places, extra = numbers
        assert shared_bytes == extra == 0
        (library,) = (one for variant, one in self.libraries.items() if function in variant.kernels())
        pointers = (ctypes.c_void_p * 32).from_address(places)
        report = library.run(function, sizes[:3], sizes[3:], pointers, [(one, True) for one in self.memory])
        assert not report.faults, list(map(str, report.faults))
        self.launched.append((function, tuple(sizes), stream))
        return (0,)
