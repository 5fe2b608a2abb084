"""Kernels compiled for the CPU once for all tests, and the emulator in the place of a GPU."""

from collections.abc import Iterator

import pytest
import torch
from tests.unit.cuda.emulated import VARIANTS, Emulated

from ftkit.cuda.on_cpu import build
from ftkit.kernels import _gpu, pinned

HERE = ("gpu_", "coded_lora")


@pytest.fixture(scope="session")
def kit() -> Emulated:
    """The variants that tests launch, compiled."""
    return Emulated(dict(zip(VARIANTS, build(VARIANTS), strict=True)))


@pytest.fixture
def gpu(kit: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """CPU tensors pass for a GPU's; the kernels that were launched."""
    launched: list[str] = []
    run = kit.launcher(1)

    def runner(*call: object) -> None:
        launched.append(str(call[1]))
        run(*call)  # type: ignore[arg-type]

    monkeypatch.setattr(_gpu, "device_type", "cpu")
    monkeypatch.setattr(_gpu, "runner", runner)
    with torch.library._scoped_library("ftkit", "IMPL") as library, pinned("cuda"):
        for name, implementation in _gpu.runs.items():
            if name.startswith(HERE):
                library.impl(name, implementation, "CPU")
        yield launched
