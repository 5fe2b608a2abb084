"""How fast this machine is at what a training step does, measured once and kept.

An operation takes as long as the slower of two roofs allows, arithmetic and memory (S. Williams et al., Roofline,
2009), and what a call takes besides.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from ftkit import _core
from ftkit.config.cache import cache_directory
from ftkit.kernels.block_matmul import block_matmul

Work = Counter[tuple[str, int, int]]
"""Operations by kind, floating-point operations and bytes that are read and written; how often each."""

_ROWS, _INNER, _OUTER = 1024, 768, 1024
"""The measured product is like a small model's linear layer over a batch's tokens."""
_BYTES = 64 << 20
"""Beyond the caches of most processors."""
_CALLS = 32
_DISK_MEGABYTES = 16
_MEASURE_SECONDS = 0.3
"""For each figure."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """A machine's roofs, with as many threads as torch has."""

    float32: float
    """Floating-point operations a second of matrix products."""
    bfloat16: float
    blocks: float
    """Of products with quantized matrices."""
    attention: float
    """Of attention inside a sequence, counted as if it were not causal."""
    bandwidth: float
    """Bytes a second that element-wise work reads and writes."""
    disk: float
    """Bytes a second that are written to the cache's disk for good."""
    call: float
    """Seconds that an operation takes besides, forward or backward."""

    def seconds(self, work: Work) -> float:
        """An estimate of how long the operations take, one after the other."""
        total = 0.0
        for (kind, flops, size), times in work.items():
            arithmetic = flops / getattr(self, kind) if flops else 0.0
            total += times * (max(arithmetic, size / self.bandwidth) + self.call)
        return total


CLEARLY = 1.5
"""So many times as fast, matrix products are worth another precision."""


def advice(found: Speeds, dtype: str) -> str | None:
    """What to say of the precision that a CPU computes in, where products in another one are clearly faster."""
    single = max(found.float32, found.blocks)  # whichever of torch and the core is the faster
    factor = found.bfloat16 / single
    if dtype == "float32" and factor >= CLEARLY:
        return (
            f"precision: this machine multiplies in bfloat16 {factor:.1f} times as fast as in float32; "
            "model.dtype=bfloat16 uses it, training.precision=int8 keeps float32 beside products in 8 bits"
        )
    if dtype == "bfloat16" and factor <= 1 / CLEARLY:
        return (
            f"precision: this machine multiplies in float32 {1 / factor:.1f} times as fast as in bfloat16; "
            "model.dtype=float32 uses it"
        )
    return None


def speeds(*, anew: bool = False) -> Speeds:
    """This machine's, as they were measured before with as many threads, or else (or `anew`) measured now and kept."""
    threads, folder = torch.get_num_threads(), cache_directory()
    if anew:
        _file(threads, folder).unlink(missing_ok=True)
        _speeds.cache_clear()
    return _speeds(threads, folder)


def _file(threads: int, folder: Path) -> Path:
    return folder / f"machine-{threads}.json"


@functools.cache
def _speeds(threads: int, folder: Path) -> Speeds:
    path = _file(threads, folder)
    machine = {"processor": processor()[0], "threads": threads, "torch": torch.__version__, "ftkit": _core.__version__}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["machine"] == machine:
            return Speeds(**known["speeds"])
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or another version's
        pass
    found = measured()
    with contextlib.suppress(OSError):  # it is measured again then
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{os.getpid()}-{path.name}"
        temporary.write_text(json.dumps({"machine": machine, "speeds": dataclasses.asdict(found)}, indent=2) + "\n")
        temporary.replace(path)
    return found


def measured() -> Speeds:
    """This machine's, measured now in a few seconds."""

    def product(dtype: torch.dtype) -> float:
        a, b = torch.randn(_ROWS, _INNER).to(dtype), torch.randn(_INNER, _OUTER).to(dtype)
        return 2 * _ROWS * _INNER * _OUTER / _seconds(lambda: a @ b)

    a, blocks = torch.randn(_ROWS, _INNER), torch.empty(_OUTER * _INNER // 32 * 34, dtype=torch.uint8)
    _core.quantize("q8_0", torch.randn(_OUTER * _INNER), blocks)
    by_blocks = _seconds(lambda: block_matmul(a, "q8_0", blocks.view(_OUTER, -1), training=True))
    large, small = torch.zeros(_BYTES // 4), torch.ones(4, requires_grad=True)

    def calls() -> None:
        x = small
        for _ in range(_CALLS):
            x = x + small
        x.backward(small.detach())

    heads, count, width = 8, 512, 64
    q = torch.randn(1, heads, count, width)
    attend = _seconds(lambda: functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    return Speeds(
        float32=product(torch.float32),
        bfloat16=product(torch.bfloat16),
        blocks=2 * _ROWS * _INNER * _OUTER / by_blocks,
        attention=4 * heads * count * count * width / attend,
        bandwidth=2 * _BYTES / _seconds(lambda: torch.add(large, 1.0, out=large)),
        disk=_disk(),
        call=_seconds(calls) / (2 * _CALLS),
    )


def _disk() -> float:
    """Of the folder that scratch files are made in; as fast as memory where it cannot be written."""
    folder, some = cache_directory(), os.urandom(1 << 20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            start = time.perf_counter()
            for _ in range(_DISK_MEGABYTES):
                file.write(some)
            os.fsync(file.fileno())
            return _DISK_MEGABYTES * len(some) / (time.perf_counter() - start)
    except OSError:
        return 1e10


def _seconds(work: Callable[[], object]) -> float:
    """The least of as many repetitions as fit a moment: a figure is kept, and others may be at work now."""
    work()  # the first call sets libraries up
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < _MEASURE_SECONDS:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def processor() -> tuple[str, list[str]]:
    """The processor's name, and the features that it says it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = [line.partition(":") for line in text.split("\n\n")[0].splitlines()]
    values = {name.strip(): value.strip() for name, _, value in fields}
    flags = (values.get("flags") or values.get("Features") or "").split()
    return values.get("model name", platform.machine()), flags
