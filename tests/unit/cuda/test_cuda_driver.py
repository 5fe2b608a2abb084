"""The host's side of launches, over a driver that the emulator stands behind; and what is said where there is none."""

from pathlib import Path

import pytest
import torch
from tests.unit.cuda.emulated import Emulated, needs_nvrtc
from tests.unit.cuda.fake_driver import FakeDriver

from ftkit.cuda import launches
from ftkit.cuda.compiler import compiler_version
from ftkit.cuda.driver import Driver, driver
from ftkit.cuda.on_cpu import Library
from ftkit.cuda.source import Variant, variant
from ftkit.errors import FtkitError, InputError
from ftkit.kernels.swiglu import swiglu

pytestmark = [pytest.mark.unit, needs_nvrtc]

SWIGLU = variant("swiglu", VALUE="float")


@pytest.fixture
def libraries(kit: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Variant, Library]:
    """One library, and a cache that is empty."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    return {SWIGLU: kit.libraries[SWIGLU]}


def made(api: FakeDriver) -> Driver:
    return Driver(api, "cpu", lambda _: 77)


def test_kernels_are_launched_with_their_arguments(libraries: dict[Variant, Library]) -> None:
    api = FakeDriver(libraries)
    gpu, gate, up = made(api), torch.randn(3, 1000), torch.randn(3, 1000)

    def launch(variant: Variant, name: str, grid: tuple[int, ...], arguments: list[launches.Argument], /) -> None:
        api.memory = [one for one in arguments if isinstance(one, torch.Tensor)]
        gpu.launch(variant, name, grid, arguments)

    torch.testing.assert_close(launches.swiglu(launch, gate, up), swiglu.reference(gate, up))
    launches.swiglu_backward(launch, gate, gate, up)
    assert api.launched == [("swiglu_forward", (2, 1, 1, 256, 1, 1), 77), ("swiglu_backward", (2, 1, 1, 256, 1, 1), 77)]
    assert len(api.loaded) == 1, "both kernels are of one source, loaded once"


def test_machine_code_is_kept_by_what_it_depends_on(libraries: dict[Variant, Library], tmp_path: Path) -> None:
    x = torch.zeros(8)

    def files(api: FakeDriver) -> int:
        api.memory = [x]
        made(api).launch(SWIGLU, "swiglu_forward", (1,), [x, x, x, 8])
        return len(list((tmp_path / "kernels").glob("*.cubin")))

    assert [files(FakeDriver(libraries)) for _ in range(2)] == [1, 1]
    assert files(FakeDriver(libraries, capability=(9, 0))) == 2
    assert files(FakeDriver(libraries, version=13030)) == 3
    path = sorted((tmp_path / "kernels").glob("*.cubin"))[0]
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:100] + b"x" + whole[101:], b""):
        path.write_bytes(damaged)
        for api in (
            FakeDriver(libraries),
            FakeDriver(libraries, capability=(9, 0)),
            FakeDriver(libraries, version=13030),
        ):
            files(api)
        assert path.read_bytes() == whole, "what is damaged is compiled anew"


def test_errors_say_what_and_what_to_do(libraries: dict[Variant, Library]) -> None:
    x = torch.zeros(8)
    broken = FakeDriver(libraries)
    broken.failing["cuInit"] = 100
    with pytest.raises(InputError, match=r"expected a driver and a GPU, got none \(CUDA's cuInit: .* got 100\)"):
        made(broken)
    major = compiler_version()[0]
    with pytest.raises(InputError, match=rf"expected a driver for CUDA {major} or newer, got one for 12.8"):
        made(FakeDriver(libraries, version=12080))
    with pytest.raises(InputError, match=r"expected a GPU of sm_80 or newer, got sm_75\nhint: FTKIT_KERNELS=reference"):
        made(FakeDriver(libraries, capability=(7, 5))).launch(SWIGLU, "swiglu_forward", (1,), [x, x, x, 8])
    failing = FakeDriver(libraries)
    failing.failing["cuLaunchKernel"] = 701
    with pytest.raises(FtkitError, match="CUDA's cuLaunchKernel: expected success, got 701"):
        made(failing).launch(SWIGLU, "swiglu_forward", (1,), [x, x, x, 8])
    gpu = made(FakeDriver(libraries))
    with pytest.raises(InputError, match=r"expected a grid of at most .* got \(1, 65536\)"):
        gpu.launch(SWIGLU, "swiglu_forward", (1, 65536), [x, x, x, 8])
    with pytest.raises(InputError, match=r"up: expected torch.float32, got torch.float64"):
        gpu.launch(SWIGLU, "swiglu_forward", (1,), [x, x.double(), x, 8])
    with pytest.raises(InputError, match=r"expected tensors on one cpu device, got cpu, meta"):
        gpu.launch(SWIGLU, "swiglu_forward", (1,), [x, x.to("meta"), x, 8])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(InputError, match=r"expected a driver and a GPU, got none(.|\n)*FTKIT_KERNELS=reference"):
        driver()
