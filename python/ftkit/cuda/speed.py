"""How fast kernels may be, from their machine code: a power mean of the times of a multiprocessor's pipes.

    time = (tensor^p + issue^p + cache^p + memory^p)^(1/p)

Issue is the slots of issue, or the clocks of the pipe of whole numbers where these are more. By p = 1 pipes wait for
one another, by p = ∞ only the busiest counts. `OVERLAP` is the p that fits public kernels with published figures best
(docs/kernels.md says how far it errs). Clocks are those of a multiprocessor; `cache` is what loads and stores take of
the memory beside it, shared or as the first level of the cache. What `counts.toml` holds is counted by `just kernels`.
"""

import functools
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from ftkit.cuda.source import FOLDER

OVERLAP = 1.87
SCHEDULERS = 4
PRODUCT_FLOPS = 2 * 16 * 8 * 16
"""Of an mma m16n8k16."""


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates."""

    name: str
    architecture: str
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    teraflops: float
    """Dense, bf16 with sums in float32."""
    mma_share: float = 1.0
    """Of the tensor core's rate that mma.sync reaches: Hopper's full rate needs wgmma, which isn't used here."""

    @property
    def integer_lanes(self) -> int:
        """Of a multiprocessor: 64, and of GeForce's Blackwell as many as there are for fractions."""
        return 128 if self.architecture == "sm_120" else 64

    @property
    def product_clocks(self) -> float:
        """Of a multiprocessor, for one mma at the greatest rate there is."""
        return PRODUCT_FLOPS * self.multiprocessors * self.gigahertz * 1e9 / (self.teraflops * 1e12)

    @property
    def bytes_per_clock(self) -> float:
        """Of global memory, for one multiprocessor."""
        return self.gigabytes_per_second / (self.multiprocessors * self.gigahertz)


@dataclass(frozen=True)
class Counts:
    """What a warp does in one round of a kernel's main loop, or in all of a kernel without one."""

    products: int
    """mma instructions."""
    issued: int
    integer: int
    """Of these, what the pipe of whole numbers does: LOP3, PRMT, SHF, IADD3, …"""
    cache_clocks: int
    bytes: int
    """Of global memory, the least there is to move; 0 where products are what bounds the kernel."""
    again: int = 0
    """Bytes of global memory that are read once more."""

    def clocks(self, gpu: Gpu) -> tuple[float, float, float, float]:
        """Of the tensor cores, of issue, of the cache and of memory."""
        tensor = self.products * gpu.product_clocks / gpu.mma_share
        issue = max(self.issued / SCHEDULERS, self.integer * 32 / gpu.integer_lanes)
        return tensor, issue, self.cache_clocks, (self.bytes + self.again) / gpu.bytes_per_clock

    def share(self, gpu: Gpu, overlap: float = OVERLAP) -> float:
        """Of the memory's roof, or of the tensor cores' where no bytes are counted."""
        roof = self.bytes / gpu.bytes_per_clock or self.products * gpu.product_clocks
        return roof / power_mean(self.clocks(gpu), overlap)


def power_mean(clocks: Sequence[float], overlap: float) -> float:
    """(Σ clocks^p)^(1/p), which is the sum for p = 1 and the greatest for p = ∞."""
    most = max(clocks)
    if math.isinf(overlap) or not most:
        return most
    return float(most * sum((one / most) ** overlap for one in clocks) ** (1 / overlap))


@functools.cache
def counts() -> dict[str, dict[str, Counts]]:
    """Kernel → architecture → its counts."""
    found = tomllib.loads((FOLDER / "counts.toml").read_text(encoding="utf-8"))
    return {
        kernel: {
            one: Counts(value[0], value[1], value[2], value[3], entry["bytes"], entry.get("again", 0))
            for one, value in entry.items()
            if one not in ("bytes", "again")
        }
        for kernel, entry in found.items()
    }


def fitted(points: Sequence[tuple[Sequence[float], float, float]]) -> float:
    """The p whose shares lie nearest to measured ones, of (clocks of the pipes, clocks at the roof, measured share)."""
    candidates = [1 + step / 100 for step in range(701)]

    def error(overlap: float) -> float:
        return sum((roof / power_mean(clocks, overlap) - share) ** 2 for clocks, roof, share in points)

    return min(candidates, key=error)
