"""Every kernel on a GPU against torch's own answer, and its time beside torch's: what `ftkit doctor --gpu` runs.

Times are medians of `ROUNDS`, the kernel and torch by turns, by the GPU's own clock; the first calls are not counted.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftkit.cuda import launches
from ftkit.cuda.launches import Launch
from ftkit.errors import InputError
from ftkit.kernels.block_matmul import dequantize
from ftkit.kernels.coded_matmul import Coded, Nested, coded_dense
from ftkit.kernels.cross_entropy import cross_entropy
from ftkit.kernels.paged_attention import paged_attention
from ftkit.kernels.rms_norm import rms_norm
from ftkit.kernels.rope import rope
from ftkit.kernels.swiglu import swiglu

ROUNDS = 20
_ROWS = {"nf4_gemv": 1, "nf4_decode": 16, "nf4_lora_forward": 2048}


@dataclass(frozen=True)
class Case:
    """One kernel at one size."""

    name: str
    ours: Callable[[], Tensor]
    torchs: Callable[[], Tensor]
    moved_bytes: int
    """The least that must be read and written."""
    tolerance: float
    """Of the difference's norm over the answer's."""


def cases(launch: Launch, device: str, size: int) -> Iterator[Case]:
    """The kernels over matrices [size, size], a multiple of 128."""
    kind = torch.bfloat16
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, kind)

    coded = _codes(size, device)
    code_bytes = coded.codes.nbytes + coded.scales.nbytes
    yield Case(
        "dequant_coded",
        lambda: launches.dense(launch, coded, kind),
        lambda: coded_dense.reference(coded).to(kind),
        code_bytes + 2 * size * size,
        1e-6,
    )
    raw = torch.randint(0, 100, (size // 8, size // 32 * 20), dtype=torch.uint8, generator=random)
    blocks = raw.to(device)
    yield Case(
        "dequant_blocks",
        lambda: launches.block_dense(launch, "q4_1", blocks, size),
        lambda: dequantize("q4_1", raw).to(device),
        blocks.nbytes + size * size // 2,
        1e-6,
    )
    for name, rows in _ROWS.items():
        x, low, b = normal(min(rows, size), size), normal(min(rows, size), 16), normal(size, 16)
        yield Case(
            name,
            lambda x=x, low=low, b=b: launches.matmul(launch, x, coded, low, b),  # type: ignore[misc]
            lambda x=x, low=low, b=b: functional.linear(x, coded_dense.reference(coded).to(kind)) + low @ b.T,  # type: ignore[misc]
            code_bytes + x.nbytes * 2,
            0.02,
        )
    dy, dlow, a = normal(min(2048, size), size), normal(min(2048, size), 16), normal(16, size)
    yield Case(
        "nf4_lora_dx",
        lambda: launches.matmul_transposed(launch, dy, coded, dlow, a),
        lambda: dy @ coded_dense.reference(coded).to(kind) + dlow @ a,
        code_bytes + dy.nbytes * 2,
        0.02,
    )
    gate, up, weight = normal(size, size), normal(size, size), normal(size)
    yield Case(
        "rms_norm",
        lambda: launches.rms_norm(launch, gate, weight, 1e-5)[0],
        lambda: rms_norm.reference(gate, weight, 1e-5),
        gate.nbytes * 2,
        0.01,
    )
    yield Case(
        "swiglu", lambda: launches.swiglu(launch, gate, up), lambda: swiglu.reference(gate, up), gate.nbytes * 3, 0.01
    )
    heads, angles = gate.view(size, -1, 64), normal(size, 32)
    yield Case(
        "rope",
        lambda: launches.rope(launch, heads, angles.cos(), angles.sin()),
        lambda: rope.reference(heads, angles.cos(), angles.sin()),
        gate.nbytes * 2,
        0.01,
    )
    pages = normal(size // 16, 1, 2, 16, 2, 64)
    table = torch.arange(size // 16, dtype=torch.int32, device=device).unsqueeze(0)
    ends, last = (torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 1], [size - 1]))
    query = normal(1, 8, 64)
    yield Case(
        "paged_attention",
        lambda: launches.paged_attention(launch, query, pages, table, ends, last, 0, 0.125, None),
        lambda: paged_attention.reference(query, pages, table, ends, last, (1,), (size,), layer=0, scale=0.125),
        pages.nbytes,
        0.01,
    )
    targets = torch.arange(size, device=device) % size
    yield Case(
        "cross_entropy",
        lambda: launches.cross_entropy(launch, gate, targets, True)[0],
        lambda: cross_entropy.reference(gate, targets, True)[0],
        gate.nbytes * 2,
        0.001,
    )
    from ftkit.kernels import _gpu_trial_ragged

    yield from _gpu_trial_ragged.cases(launch, device, size)


def difference(case: Case) -> float:
    """The norm of the difference to torch's answer over that answer's; NaN counts as infinite."""
    found, expected = case.ours().double(), case.torchs().double()
    ratio = float((found - expected).norm() / expected.norm())
    return ratio if ratio == ratio else float("inf")


def report(size: int = 4096) -> list[dict[str, Any]]:
    """One entry a kernel. Raises InputError without an NVIDIA GPU, or with a driver or GPU that is too old."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise InputError(
            "doctor --gpu: expected an NVIDIA GPU, got none that torch can use",
            "without one, `pytest tests/unit/cuda` runs the same kernels on the CPU",
        )
    from ftkit.cuda.driver import launch

    found = []
    for case in cases(launch, "cuda", size):
        error = difference(case)
        ours, torchs = _microseconds(case)
        found.append(
            {
                "kernel": case.name,
                "passed": error <= case.tolerance,
                "difference": error,
                "microseconds": ours,
                "torch_microseconds": torchs,
                "gigabytes_per_second": case.moved_bytes / ours / 1e3,
            }
        )
    return found


def _microseconds(case: Case) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 3):
        for run, into in zip((case.ours, case.torchs), times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                into.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def _codes(size: int, device: str) -> Coded:
    """Random codes with nested scales, in NF4's layout."""
    random = torch.Generator().manual_seed(1)
    groups = size * size // 64
    return Coded(
        shape=(size, size),
        codes=torch.randint(0, 256, (size * size // 2,), dtype=torch.uint8, generator=random).to(device),
        table=torch.linspace(-1, 1, 16).to(device),
        group=64,
        scales=torch.randint(0, 256, (groups,), dtype=torch.uint8, generator=random).to(device),
        nested=Nested(
            map=torch.linspace(-1, 1, 256).to(device),
            greatest=torch.full((-(-groups // 256),), 0.01, device=device),
            mean=torch.full((1,), 0.02, device=device),
        ),
    )
