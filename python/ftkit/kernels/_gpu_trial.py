"""Every kernel on a GPU against torch's own answer, and its time beside torch's: what `ftkit doctor --gpu` runs.

Times are medians of `ROUNDS`, the kernel, torch and bitsandbytes (where it is installed, for products with NF4) by
turns, by the GPU's own clock; the first calls are not counted. Beside them stands what the machine code foretells at
the rates that torch's own product and copy reach on this GPU, and the overlap of pipes (see cuda/speed.py) that fits.
"""

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftkit.cuda import launches
from ftkit.cuda.launches import Launch
from ftkit.cuda.speed import OVERLAP, Gpu, counts, fitted
from ftkit.errors import InputError
from ftkit.kernels.block_matmul import dequantize
from ftkit.kernels.coded_matmul import Coded, Nested, coded_dense
from ftkit.kernels.cross_entropy import cross_entropy
from ftkit.kernels.paged_attention import paged_attention
from ftkit.kernels.rms_norm import rms_norm
from ftkit.kernels.rope import rope
from ftkit.kernels.swiglu import swiglu

ROUNDS = 20
_SHORT = launches.DECODE_COLUMNS // 2
_PRODUCTS = (("coded_gemv", 1, _SHORT), ("coded_decode", 1, 0), ("coded_decode", 16, 0), ("coded_forward", 2048, 0))
"""Kernel, rows of x, and of how many columns if not of all."""


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
    flops: int = 0
    """Where the tensor cores bound it."""
    counted: str = ""
    """In cuda/counts.toml, by this name; nothing is foretold of others."""
    peer: Callable[[], Tensor] | None = None
    """bitsandbytes' own, of as many rows and columns."""


def cases(launch: Launch, device: str, size: int) -> Iterator[Case]:
    """The kernels over matrices [size, size], a multiple of 128."""
    kind = torch.bfloat16
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, kind)

    coded = _codes(size, size, device)
    code_bytes = coded.codes.nbytes + coded.scales.nbytes
    yield Case(
        "dequant_coded",
        lambda: launches.dense(launch, coded, kind),
        lambda: coded_dense.reference(coded).to(kind),
        code_bytes + 2 * size * size,
        1e-6,
        counted="dequant_coded",
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
    for name, rows, columns in _PRODUCTS:
        k = min(size, columns or size)
        w = _codes(size * size // k, k, device)
        x, low, b = normal(min(rows, size), k), normal(min(rows, size), 16), normal(w.shape[0], 16)
        if name == "coded_decode" and rows == 1 and k < launches.DECODE_COLUMNS:
            continue  # so few columns are another kernel's
        yield Case(
            name,
            lambda x=x, w=w, low=low, b=b: launches.matmul(launch, x, w, low, b),  # type: ignore[misc]
            lambda x=x, w=w, low=low, b=b: functional.linear(x, coded_dense.reference(w).to(kind)) + low @ b.T,  # type: ignore[misc]
            code_bytes + x.nbytes * 2,
            0.02,
            flops=2 * len(x) * size * size if name == "coded_forward" else 0,
            counted=name if rows != 1 or name == "coded_gemv" else "",
            peer=_bitsandbytes(x, *w.shape),
        )
    dy, dlow, a = normal(min(2048, size), size), normal(min(2048, size), 16), normal(16, size)
    yield Case(
        "coded_dx",
        lambda: launches.matmul_transposed(launch, dy, coded, dlow, a),
        lambda: dy @ coded_dense.reference(coded).to(kind) + dlow @ a,
        code_bytes + dy.nbytes * 2,
        0.02,
        flops=2 * len(dy) * size * size,
        counted="coded_dx",
    )
    gate, up, weight = normal(size, size), normal(size, size), normal(size)
    yield Case(
        "rms_norm",
        lambda: launches.rms_norm(launch, gate, weight, 1e-5)[0],
        lambda: rms_norm.reference(gate, weight, 1e-5),
        gate.nbytes * 2,
        0.01,
        counted="rms_norm_forward",
    )
    yield Case(
        "swiglu",
        lambda: launches.swiglu(launch, gate, up),
        lambda: swiglu.reference(gate, up),
        gate.nbytes * 3,
        0.01,
        counted="swiglu_forward",
    )
    heads, angles = gate.view(size, -1, 64), normal(size, 32)
    yield Case(
        "rope",
        lambda: launches.rope(launch, heads, angles.cos(), angles.sin()),
        lambda: rope.reference(heads, angles.cos(), angles.sin()),
        gate.nbytes * 2,
        0.01,
        counted="rope",
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


def foretold(case: Case, gpu: Gpu, overlap: float = OVERLAP) -> float | None:
    """Microseconds that the case takes on this GPU; None where nothing is foretold of the kernel."""
    if case.counted not in counts() or gpu.architecture not in counts()[case.counted]:
        return None
    return _at_the_roof(case, gpu) / counts()[case.counted][gpu.architecture].share(gpu, overlap)


def _at_the_roof(case: Case, gpu: Gpu) -> float:
    """Microseconds at the full rate of what bounds the case."""
    return case.flops / gpu.teraflops / 1e6 if case.flops else case.moved_bytes / gpu.gigabytes_per_second / 1e3


def overlap_of(measured: Sequence[tuple[Case, float]], gpu: Gpu) -> float | None:
    """The overlap of pipes that fits these cases' microseconds best; None where nothing is foretold of any."""
    points = [
        (counts()[case.counted][gpu.architecture].clocks(gpu), case, microseconds)
        for case, microseconds in measured
        if foretold(case, gpu) is not None
    ]
    if not points:
        return None
    return fitted(
        [
            (clocks, clocks[0] * gpu.mma_share if case.flops else clocks[3], _at_the_roof(case, gpu) / microseconds)
            for clocks, case, microseconds in points
        ]
    )


def report(size: int = 4096) -> dict[str, Any]:
    """The GPU, the fitted overlap, and one entry a kernel.

    Raises InputError without an NVIDIA GPU, or with a driver or GPU that is too old.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise InputError(
            "doctor --gpu: expected an NVIDIA GPU, got none that torch can use",
            "without one, `pytest tests/unit/cuda` runs the same kernels on the CPU",
        )
    from ftkit.cuda.driver import launch

    gpu = _this_gpu()
    return tried(list(cases(launch, "cuda", size)), gpu, _microseconds)


def tried(
    all_cases: Sequence[Case], gpu: Gpu, clock: Callable[[Sequence[Callable[[], Tensor]]], list[float]]
) -> dict[str, Any]:
    """What `report` says of these cases; `clock` gives the microseconds of each of some functions, run by turns."""
    found, measured = [], []
    for case in all_cases:
        error = difference(case)
        ours, torchs, *peers = clock([case.ours, case.torchs, *([case.peer] if case.peer else [])])
        measured.append((case, ours))
        found.append(
            {
                "kernel": case.name,
                "passed": error <= case.tolerance,
                "difference": error,
                "microseconds": ours,
                "foretold_microseconds": foretold(case, gpu),
                "torch_microseconds": torchs,
                "bitsandbytes_microseconds": peers[0] if peers else None,
                "gigabytes_per_second": case.moved_bytes / ours / 1e3,
                "teraflops": case.flops / ours / 1e6 if case.flops else None,
            }
        )
    return {
        "gpu": {
            "name": gpu.name,
            "architecture": gpu.architecture,
            "multiprocessors": gpu.multiprocessors,
            "gigahertz": gpu.gigahertz,
            "gigabytes_per_second": gpu.gigabytes_per_second,
            "teraflops": gpu.teraflops,
        },
        "overlap": OVERLAP,
        "fitted_overlap": overlap_of(measured, gpu),
        "kernels": found,
    }


def readable(found: dict[str, Any]) -> str:
    """A report as lines."""
    gpu = found["gpu"]
    lines = [
        f"{gpu['name']}, {gpu['architecture']}: {gpu['multiprocessors']} multiprocessors, {gpu['gigahertz']:.2f} GHz",
        f"torch reaches {gpu['teraflops']:.0f} TFLOP/s and {gpu['gigabytes_per_second']:.0f} GB/s",
        f"overlap of pipes: {found['overlap']} foretold, {found['fitted_overlap']} fits",
        f"{'kernel':<17}        {'µs':>9} {'foretold':>9} {'torch':>9} {'bnb':>9} {'GB/s':>7}",
    ]
    for one in found["kernels"]:
        names = ("microseconds", "foretold_microseconds", "torch_microseconds", "bitsandbytes_microseconds")
        times = " ".join(f"{'–':>9}" if one[name] is None else f"{one[name]:9.1f}" for name in names)
        verdict = "right" if one["passed"] else "WRONG"
        lines.append(f"{one['kernel']:<17} {verdict}  {times} {one['gigabytes_per_second']:7.1f}")
    return "\n".join(lines)


def _this_gpu() -> Gpu:
    """Its rates: the clock as the driver says, the others as torch's product and copy reach them."""
    from ftkit.cuda.driver import driver

    device = torch.device("cuda", torch.cuda.current_device())
    facts, size = torch.cuda.get_device_properties(device), 4096
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    large = torch.empty(2**28, dtype=torch.uint8, device=device)
    product, copy = _microseconds([lambda: a @ a, large.clone])
    architecture = driver().architecture(device)
    return Gpu(
        facts.name,
        architecture,
        facts.multi_processor_count,
        driver().gigahertz(device),
        2 * large.nbytes / copy / 1e3,
        2 * size**3 / product / 1e6,
        mma_share=0.62 if architecture == "sm_90" else 1.0,
    )


def _microseconds(runs: Sequence[Callable[[], Tensor]]) -> list[float]:
    times: list[list[float]] = [[] for _ in runs]
    for number in range(ROUNDS + 3):
        for run, into in zip(runs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                into.append(start.elapsed_time(end) * 1e3)
    return [statistics.median(one) for one in times]


def _bitsandbytes(x: Tensor, rows: int, columns: int) -> Callable[[], Tensor] | None:
    """Its product of x with a random NF4 matrix; None where it isn't installed, or x is not on a GPU."""
    if x.device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        return None
    theirs = importlib.import_module("bitsandbytes")
    weight = torch.randn(rows, columns, dtype=x.dtype, device=x.device)
    codes, state = theirs.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return lambda: theirs.matmul_4bit(x, codes.t(), quant_state=state)


def _codes(rows: int, columns: int, device: str) -> Coded:
    """Random codes with nested scales, in NF4's layout."""
    random = torch.Generator().manual_seed(1)
    groups = rows * columns // 64
    return Coded(
        shape=(rows, columns),
        codes=torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, generator=random).to(device),
        table=torch.linspace(-1, 1, 16).to(device),
        group=64,
        scales=torch.randint(0, 256, (groups,), dtype=torch.uint8, generator=random).to(device),
        nested=Nested(
            map=torch.linspace(-1, 1, 256).to(device),
            greatest=torch.full((-(-groups // 256),), 0.01, device=device),
            mean=torch.full((1,), 0.02, device=device),
        ),
    )
