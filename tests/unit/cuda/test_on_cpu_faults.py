"""The emulator finds what kernels must not do, and names the place; what they may do passes."""

import pytest
import torch

from ftkit.cuda.on_cpu import SCHEDULES, Library, Report, build
from ftkit.cuda.source import Variant
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

HEAD = '#include "numbers.cuh"\nextern "C" __global__ void __launch_bounds__(64) k(const float* x, float* y, int n) {\n'
SHARED = "__shared__ float s[64];\nint t = threadIdx.x;\n"
# The kernel's body, each line of it from line 3 on; 64 threads, x and y of 64 floats, n = 64.
FAULTY = {
    "race": (SHARED + "s[t] = x[t];\ny[t] = s[63 - t];", 6),
    "race in a warp": (SHARED + "s[t] = x[t];\ny[t] = s[t ^ 1];", 6),
    "race of writes": (
        "__shared__ float s[2];\nint t = threadIdx.x;\ns[t / 64] = x[t];\n__syncthreads();\ny[t] = s[0];",
        5,
    ),
    "race in global memory": ("y[threadIdx.x / 2] = x[threadIdx.x];", 3),
    "read of nothing": (
        SHARED + "if (t) s[t] = x[t];\n__syncthreads();\ny[t] = s[t];",
        7,
    ),
    "read of a copy in flight": (
        "__shared__ bf16 s[512];\nint t = threadIdx.x;\ncopy16_async(s + 8 * t, x, true);\ncopy_commit();\n"
        "y[t] = wide(s[8 * t]);\ncopy_wait<0>();",
        7,
    ),
    "thread ended with copies in flight": ("__shared__ bf16 s[512];\ncopy16_async(s + 8 * threadIdx.x, x, true);", 4),
    "out of bounds": ("y[threadIdx.x + 1] = x[threadIdx.x];", 3),
    "out of bounds of shared memory": ("DYNAMIC_SHARED(s);\n((float*)s)[threadIdx.x * 5] = 1.0f;", 4),
    "write to const": ("((float*)x)[threadIdx.x] = 1.0f;", 3),
    "misaligned": ("y[threadIdx.x] = *(const float*)((const char*)x + (threadIdx.x ? 0 : 2));", 3),
    "barrier reached from different places": (
        "if (threadIdx.x < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}",
        6,
    ),
    "deadlock": ("if (threadIdx.x < 40)\n__syncwarp();\nelse\n__syncthreads();", 6),
    "divergent warp operation": (
        "int t = threadIdx.x;\nif (t % 2)\ny[t] = __shfl_sync(~0u, 1.0f, 0);\nelse\n"
        "y[t] = __shfl_xor_sync(~0u, 2.0f, 1);",
        5,
    ),
    "lane not in its own mask": ("y[threadIdx.x] = __shfl_sync(1u, 1.0f, 0);", 3),
    "shuffle from outside the mask": ("if (threadIdx.x < 16)\ny[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);", 4),
    "warp operation with lanes that have ended": ("if (threadIdx.x % 2) return;\n__syncwarp();", 4),
}
SOUND = {
    "barriers order": SHARED + "s[t] = x[t];\n__syncthreads();\ny[t] = s[63 - t];",
    "a warp's barrier orders its lanes": (SHARED + "s[t] = x[t ^ 32];\n__syncwarp();\ny[t] = s[t ^ 31];"),
    "copies land when waited for": (
        SHARED + "if (t < 16) copy16_async(s + 4 * t, x + 4 * t, true);\ncopy_commit();\n"
        "copy_wait<0>();\n__syncthreads();\ny[t] = s[63 - t];"
    ),
    "shuffles": "int t = threadIdx.x;\ny[t] = __shfl_xor_sync(~0u, x[t ^ 32], 31);",
    "threads may end before a barrier": (
        SHARED + "s[t] = x[t];\nif (t > 31) return;\n__syncthreads();\ny[t] = s[63 - t];\ny[63 - t] = s[t];"
    ),
}


def made(name: str, text: str) -> Variant:
    return Variant(name, changed=((f"{name}.cu", text),))


@pytest.fixture(scope="module")
def broken() -> dict[str, Library]:
    bodies = {name: body for name, (body, _) in FAULTY.items()} | SOUND
    built = build([made("broken", f"{HEAD}{body}\n}}\n") for body in bodies.values()])
    return dict(zip(bodies, built, strict=True))


def launch(library: Library, schedule: int, y: torch.Tensor | None = None) -> Report:
    x, y = torch.arange(64.0), torch.zeros(64) if y is None else y
    return library.launch("k", (1,), [x, y, 64], shared_bytes=256, schedule=schedule, seed=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_found_under_every_schedule(broken: dict[str, Library], name: str, schedule: int) -> None:
    faults = launch(broken[name], schedule).faults
    wanted = [fault for fault in faults if name.startswith(fault.kind)]
    assert wanted, list(map(str, faults))
    assert any(f"broken.cu:{FAULTY[name][1]}" in (fault.where, fault.other) for fault in wanted), list(map(str, wanted))
    assert all(-1 <= fault.thread < 64 and fault.block == (0, 0, 0) for fault in faults)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SOUND)
def test_what_is_allowed_passes(broken: dict[str, Library], name: str, schedule: int) -> None:
    y = torch.zeros(64)
    report = launch(broken[name], schedule, y)
    assert not report.faults, list(map(str, report.faults))
    assert torch.equal(y, torch.arange(64.0).flip(0))


def test_a_fault_reads_as_a_sentence(broken: dict[str, Library]) -> None:
    (fault,) = launch(broken["out of bounds"], 0).faults
    assert str(fault) == "broken.cu:3: out of bounds, write of 4 bytes of global memory, block (0, 0, 0), thread 63"


def test_bank_conflicts_and_sectors_are_counted_by_line() -> None:
    text = (
        HEAD + "__shared__ float s[64 * 32];\nint t = threadIdx.x;\ns[t * 32] = x[t];\n"
        "__syncthreads();\ns[t] = 1.0f;\ny[t / 32 * 32 + t * 9 % 32] = s[t * 32];\n}\n"
    )
    (library,) = build([made("strided", text)])
    x, y = torch.zeros(64), torch.zeros(64)
    report = library.launch("k", (1,), [x, y, 64], traffic=True)
    found = {(one.where, one.kind): (one.requests, one.taken, one.least) for one in report.traffic}
    assert found["strided.cu:5", "store shared"] == (2, 64, 2), "32 lanes in one bank"
    assert found["strided.cu:7", "store shared"] == (2, 2, 2)
    assert found["strided.cu:5", "load global"] == (2, 8, 8), "128 bytes are four sectors"
    assert found["strided.cu:8", "store global"] == (2, 8, 8), "in any order"
    assert report.counters["barriers"] == 1
    assert report.counters["loaded_bytes"] == report.counters["stored_bytes"] == 256


def test_the_tensor_core_needs_a_whole_warp() -> None:
    text = HEAD.replace("(64)", "(40)") + "float d[4] = {};\nuint32_t a[4] = {};\nmma_bf16(d, a, 0, 0);\n}\n"
    (library,) = build([made("part", text)])
    (fault,) = launch(library, 0).faults
    assert (fault.kind, fault.where) == ("whole-warp operation in a part of a warp", "part.cu:5")


def test_what_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"g\+\+ refused (.|\n)*wrong.cu:3(.|\n)*nothing"):
        build([made("wrong", HEAD + "nothing;\n}\n")])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"expected g\+\+ on the path, got none\nhint: install it"):
        build([made("other", HEAD + "}\n")])


def test_arguments_are_held_against_the_parameters(broken: dict[str, Library]) -> None:
    library, x = broken["out of bounds"], torch.zeros(64)
    for wrong, what in (
        ([x, x], "expected 3 arguments, got 2"),
        ([x, x.double(), 64], "y: expected torch.float32, got torch.float64"),
        ([x, torch.zeros(64, 2)[:, 0], 64], r"y: expected a contiguous tensor, got strides \(2,\)"),
        ([x, 1.0, 64], "y: expected a tensor, got 1.0"),
        ([x, x, 2**31], "n: expected a number of 32 bits, got 2147483648"),
        ([x, x.to("meta"), 64], "expected tensors on one cpu device, got cpu, meta"),
    ):
        with pytest.raises(InputError, match=what):
            library.launch("k", (1,), wrong)
