"""Writes docs/kernels.md: what the CUDA kernels' machine code says of their speed, without running it.

    max   the busiest of the pipes alone: no kernel is faster
    sum   the pipes one after another: what a kernel does that overlaps nothing; for ranking

Clocks are those of a multiprocessor, for one mma m16n8k16 and what comes with it in the main loop.
"""

from dataclasses import dataclass
from pathlib import Path

from bench import _sass
from ftkit.cuda import source
from ftkit.cuda.source import variant

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
SCHEDULERS = 4
PRODUCT_FLOPS = 2 * 16 * 8 * 16
STEP_BYTES = 32 * 32 + 32
"""Of codes and nested scales, for a warp's step: 32 columns of 64 values."""


@dataclass(frozen=True)
class Gpu:
    """Published figures, and the clocks of an mma that follow from them."""

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
    def product_clocks(self) -> float:
        """Of a multiprocessor, for one mma at the greatest rate there is."""
        return PRODUCT_FLOPS * self.multiprocessors * self.gigahertz * 1e9 / (self.teraflops * 1e12)

    @property
    def bytes_per_clock(self) -> float:
        """Of global memory, for one multiprocessor."""
        return self.gigabytes_per_second / (self.multiprocessors * self.gigahertz)


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41, 1555, 312),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 1008, 165),
    Gpu("H100", "sm_90", 132, 1.83, 3350, 989, mma_share=0.62),
    Gpu("RTX 5090", "sm_120", 170, 2.41, 1792, 209.5),
)
# kernel, measured share of the tensor core's rate, predicted by sum; RTX PRO 6000, products of 8192 in half precision
CALIBRATION = (("vectorised", 39, 46), ("pipelined", 42, 47), ("warp tiles", 57, 54))


def shares(gpu: Gpu, name: str) -> tuple[float, float]:
    """(max, sum) of the tensor core's roof for tiles, of the memory's for decoding."""
    loop = _sass.examine(variant(name, SCALE="uint8_t"), gpu.architecture)[name].loop
    assert loop is not None
    products = loop.products
    tensor = gpu.product_clocks / gpu.mma_share
    pipes = [tensor, loop.issued / products / SCHEDULERS, loop.shared_clocks / products]
    roof = gpu.product_clocks
    if name == "nf4_decode":
        roof = STEP_BYTES / gpu.bytes_per_clock / products
        pipes.append(roof)
    return roof / max(pipes), roof / sum(pipes)


def document() -> str:
    """The page."""
    lines = [_HEAD, "| kernel | of the roof of | " + " | ".join(f"{gpu.name} max / sum" for gpu in GPUS) + " |"]
    lines.append("|---|---|" + "---|" * len(GPUS))
    for name, roof in (("nf4_decode", "memory"), ("nf4_lora_forward", "tensor cores"), ("nf4_lora_dx", "tensor cores")):
        cells = " | ".join("{:.0%} / {:.0%}".format(*shares(gpu, name)) for gpu in GPUS)
        lines.append(f"| `{name}` | {roof} | {cells} |")
    lines += ["", _CALIBRATION, "| kernel | measured | by sum |", "|---|---|---|"]
    lines += [f"| {name} | {measured} % | {predicted} % |" for name, measured, predicted in CALIBRATION]
    lines += ["", _REST, "| source | what it is |", "|---|---|"]
    for name in source.names():
        first = source.read(f"{name}.cu").splitlines()[0].removeprefix("// ")
        lines.append(f"| `{name}.cu` | {first} |")
    return "\n".join(lines) + "\n"


_HEAD = """# CUDA kernels

Written by `just kernels`; a test holds it to what is compiled. None of it was measured: no GPU was at hand. What a
GPU says is `ftkit doctor --gpu`'s to tell.

## Speed, from the machine code alone

`max` is the busiest pipe alone, which no kernel can beat. `sum` has the pipes wait for one another, and ranks kernels.
For products of many rows (4096³, a tile of 128 × 128), and for decoding up to 16 rows. Scales are quantized again. The
other kernels wait for memory, and no more is foretold of them.
"""
_CALIBRATION = """## How far that is from the truth

Three public kernels with measured figures (waynehacking8/blackwell-tensorcore-kernels), in shares of the tensor core's
rate. Three points on one GPU: take the sum for a ranking, and for what it is, a guess. By `max` all three are at 100 %.
"""
_REST = """What others publish of theirs, each in their own terms: Marlin near the memory's roof up to 16–32 rows (A10);
llama.cpp's one-row kernels 88–94 % of the memory's roof on large layers (others' profiles), its products of prompts 57
TFLOP/s on an RTX 3090, about 80 % of its bf16 roof; bitsandbytes up to 4 × over dequantizing first, at 2–64 rows.

What can't be known here: time itself, clocks under load, the second level of the cache, how well loads are hidden, the
cost of a launch, the tensor core's own rounding, and faults of the assembler: machine code is never run, only the
source and the PTX. For H100, the share that mma.sync has of the full rate (62 %) is taken from others.

## The kernels

Each runs in the tests on the CPU, thread by thread, with its accesses checked, and again as the PTX that NVRTC emits.
Values of 4-bit weights are rounded once to the type of x, so that all kernels multiply with the same W. A row's result
does not depend on the other rows within a kernel; which kernel runs depends on how many rows there are (up to 4, up
to 16, more).
"""

if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(), encoding="utf-8")
