"""Writes docs/kernels.md and cuda/counts.toml: what the CUDA kernels' machine code says of their speed, unrun.

    max     the busiest of the pipes alone: no kernel is faster
    fitted  the power mean that fits public kernels with published figures best: the prediction
    sum     the pipes one after another: what a kernel does that overlaps nothing

Clocks are those of a multiprocessor; see cuda/speed.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from bench import _sass
from ftkit.cuda import source
from ftkit.cuda.source import Variant, variant
from ftkit.cuda.speed import OVERLAP, Counts, Gpu, counts, fitted, power_mean

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
COUNTS = source.FOLDER / "counts.toml"
SPAN_BYTES = 32 * 128 + 32 * 4
"""Of codes and nested scales, for a warp's round of decoding: 32 columns of 256 values."""

GPUS = (
    Gpu("A100", "sm_80", 108, 1.41, 1555, 312),
    Gpu("RTX 4090", "sm_89", 128, 2.52, 1008, 165),
    Gpu("H100", "sm_90", 132, 1.83, 3350, 989, mma_share=0.62),
    Gpu("RTX 5090", "sm_120", 170, 2.41, 1792, 209.5),
)
_NF4: dict[str, object] = {"SCALE": "uint8_t", "GROUP": 64, "OFFSETS": 0}
_ROWS = ("rms_norm_forward", "rms_norm_dx", "cross_entropy", "paged_attention")
# kernel → its variant, and bytes of memory that a warp moves in a round; 0 where products bound it
ROUNDS: dict[str, tuple[Variant, int]] = {
    "coded_gemv": (variant("coded_gemv", ROWS=1, VALUE="bf16", **_NF4), 128 + 4),
    "coded_decode": (variant("coded_decode", **_NF4), SPAN_BYTES),
    "coded_forward": (variant("coded_forward", **_NF4), 0),
    "coded_dx": (variant("coded_dx", **_NF4), 0),
    **{name: (variant("attention", HEAD=128), 0) for name in ("attention_forward", "attention_dq", "attention_dkv")},
    "dequant_blocks": (variant("dequant_blocks", FORMAT="Q4_K", OUT="float"), 32 * 4 * 144 // 256 + 32 * 16),
    "dequant_coded": (variant("dequant_coded", TABLE=16, SCALE="uint8_t", OFFSETS=0, OUT="bf16"), 32 * (4 + 16) + 4),
    "swiglu_forward": (variant("swiglu", VALUE="bf16"), 32 * 3 * 16),
    "swiglu_backward": (variant("swiglu", VALUE="bf16"), 32 * 5 * 16),
    "rope": (variant("rope", VALUE="bf16"), 32 * 4 * 16),
    "adamw_8bit": (variant("adamw_8bit"), 32 * (8 + 4 + 4)),
    "rms_norm_forward": (variant("rms_norm", VALUE="bf16"), 32 * 2 * 16),
    "rms_norm_dx": (variant("rms_norm", VALUE="bf16"), 32 * 3 * 16),
    "cross_entropy": (variant("cross_entropy", VALUE="bf16", GRADIENT=1), 32 * 4 * 2 * 2),
    "paged_attention": (variant("paged_attention", VALUE="bf16", HEAD=128), 4 * 128 * 2 * 2),
}
AGAIN = {"cross_entropy": 32 * 4 * 2}
"""Bytes that are read once more: all rows at work, of 100 thousand logits each, are more than a cache holds."""
ARCHITECTURES = tuple(_sass.MULTIPROCESSORS)


@dataclass(frozen=True)
class Published:
    """A public kernel with a figure that others measured, and clocks for each of its mma: ours, of its machine code."""

    name: str
    where: str
    gpu: str
    tensor: float
    issue: float
    cache: float
    measured: float

    @property
    def clocks(self) -> tuple[float, float, float]:
        return self.tensor, self.issue, self.cache

    def share(self, overlap: float) -> float:
        """Of the tensor cores' rate."""
        return self.tensor / power_mean(self.clocks, overlap)


_ADA, _AMPERE = "spatters/mma-matmul", "yencal/cuda-hgemm-mma"
_BLACKWELL = "waynehacking8/blackwell-tensorcore-kernels"
CALIBRATION = (
    Published("2.0", _ADA, "RTX 4090", 8.0, 1.12, 8.0, 0.770),
    Published("2.1", _ADA, "RTX 4090", 8.0, 0.92, 6.0, 0.808),
    Published("3.0", _ADA, "RTX 4090", 8.0, 1.52, 4.0, 0.832),
    Published("3.1", _ADA, "RTX 4090", 8.0, 0.66, 2.0, 0.930),
    Published("02 swizzle", _AMPERE, "A100", 2.0, 0.46, 1.38, 0.679),
    Published("03 multistage", _AMPERE, "A100", 2.0, 0.57, 1.38, 0.785),
    Published("04 pipelining", _AMPERE, "A100", 2.0, 0.77, 1.38, 0.817),
    Published("warp tiles", _BLACKWELL, "RTX PRO 6000", 4.0, 1.33, 1.50, 0.850),
)


def counted(name: str, architecture: str) -> Counts:
    """What a warp does in a round of this kernel."""
    one, moved = ROUNDS[name]
    code = _sass.examine(one, architecture)[name]
    if name in _ROWS:
        assert code.passes is not None
        round_ = code.passes
    else:
        round_ = code.loop if name.startswith(("coded", "attention")) and code.loop is not None else code.whole
    cache = round_.shared_clocks + round_.global_clocks
    return Counts(round_.products, round_.issued, round_.integer, cache, moved, AGAIN.get(name, 0))


def counts_text() -> str:
    """What cuda/counts.toml holds."""
    lines = [
        "# Written by `just kernels`: what a warp does in a round of a kernel; a test holds it to what is compiled.",
        "# bytes: of memory, the least there is to move; again: read once more. For an architecture: mma, slots of",
        "# issue, those of them for the pipe of whole numbers, cache's clocks.",
    ]
    for name, (_, moved) in ROUNDS.items():
        lines += ["", f"[{name}]", f"bytes = {moved}", *([f"again = {AGAIN[name]}"] if name in AGAIN else [])]
        for architecture in ARCHITECTURES:
            one = counted(name, architecture)
            lines.append(f"{architecture} = [{one.products}, {one.issued}, {one.integer}, {one.cache_clocks}]")
    return "\n".join(lines) + "\n"


def errors() -> list[float]:
    """Of each public kernel's share, foretold by what the others fit."""
    found = []
    for one in CALIBRATION:
        others = [(other.clocks, other.tensor, other.measured) for other in CALIBRATION if other is not one]
        found.append(one.share(fitted(others)) - one.measured)
    return found


def document() -> str:
    """The page, of what counts.toml holds."""
    lines = [_HEAD, "| kernel | of the roof of | " + " | ".join(gpu.name for gpu in GPUS) + " |"]
    lines.append("|---|---|" + "---|" * len(GPUS))
    for name, (_, moved) in ROUNDS.items():
        cells = []
        for gpu in GPUS:
            found = counts()[name][gpu.architecture]
            cells.append(" / ".join(f"{found.share(gpu, overlap):.0%}" for overlap in (math.inf, OVERLAP, 1.0)))
        lines.append(f"| `{name}` | {'memory' if moved else 'tensor cores'} | {' | '.join(cells)} |")
    off = errors()
    lines += ["", _CALIBRATION, "| kernel | GPU | measured | fitted | without it | sum |", "|---|---|---|---|---|---|"]
    for one, error in zip(CALIBRATION, off, strict=True):
        shares = (one.measured, one.share(OVERLAP), one.measured + error, one.share(1.0))
        lines.append(f"| {one.where} {one.name} | {one.gpu} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    typical = math.sqrt(sum(error**2 for error in off) / len(off))
    of_sum = math.sqrt(sum((one.share(1.0) - one.measured) ** 2 for one in CALIBRATION) / len(CALIBRATION))
    lines += [
        "",
        f"p = {OVERLAP}. What the others foretell of a kernel errs by {typical:.0%} of the roof (root mean square), by",
        f"{max(map(abs, off)):.0%} at most; the sum errs by {of_sum:.0%}, and always to the same side.",
        "",
        _LIMITS,
        _REST,
        "| source | what it is |",
        "|---|---|",
    ]
    for name in source.names():
        first = source.read(f"{name}.cu").splitlines()[0].removeprefix("// ")
        lines.append(f"| `{name}.cu` | {first} |")
    return "\n".join(lines) + "\n"


_HEAD = """# CUDA kernels

Written by `just kernels`; a test holds it to what is compiled. None of it was measured: no GPU was at hand. What a
GPU says is `ftkit doctor --gpu`'s to tell.

## Speed, from the machine code alone

Three shares of a roof: `max` is the busiest pipe alone, which no kernel can beat; `fitted` is the prediction, the power
mean of the pipes that fits public kernels best; `sum` has the pipes wait for one another. For products of many rows
(4096³), for decoding 9 to 16 rows, for one row of fewer than 1024 values (longer ones are decoded as several are), for
attention with heads of 128 (of the products that are made, those of a masked half too), and for elementwise kernels, of
which all instructions are counted, those of a ragged end too. Scales are quantized again. Of kernels that go over a row
their loops are counted, which a long row is: `rms_norm` finds its row in the cache the second time, `cross_entropy`
with its gradient reads 100 thousand logits from memory again (hence 67 % at most), `paged_attention` has a head of keys
for each head of queries; what waiting at their barriers and for the first load costs isn't in it. Each cell is max /
fitted / sum.
"""
_CALIBRATION = """## How far that is from the truth

Public kernels with figures that others measured, in shares of the tensor cores' rate: on an RTX 4090 with its clock
locked, on an A100 (of 312 TFLOP/s, products of 8192), on an RTX PRO 6000 (the tensor pipe's use by Nsight Compute: the
card's clock falls under load). Their sources were compiled by the same compiler, and counted as ours are; that their
layouts have no bank conflicts, as meant, was not looked at (of the last, Nsight Compute counts 14 % more accesses). The
A100's were tuned by a search whose winner isn't told: a tile of 256 × 128 is assumed, with sums in half precision.
Issue is in slots there: such kernels do little with whole numbers. `without it`: foretold by the p that fits the
others.
"""
_LIMITS = """\
By the RTX PRO 6000's kernel the sum was held to be right before: its 243 TFLOP/s are 57 % of the 427 that a probe of
the rate reached. But the probe ran at another clock: the same repository's profile has the tensor pipe at 85 %. By the
sum, a tile of 256 × 128 with warps of 64 × 64 is at 53 % of an A100, where cuBLAS has 289 of 312 TFLOP/s (by yencal);
and a product with 16 rows at 76 % of its memory, even if it did nothing but mma.

What keeps `coded_forward` from more on an A100, by the sum: for each mma there are 2 clocks of the tensor core, 1 of
shared memory to read x (a warp has 128 rows by 32 columns; 128 sums fill half of the registers), 0.4 to make the values
of W, which all kernels round alike after the product with the scale (21 instructions for 4 registers, used 16 times),
0.25 to issue the mma, and 0.5 for copies and the rest. Warps of 64 × 64 would read half of x, and make each value of W
for half as many products: no gain. For 60 % by the sum all beside the tensor core may take 1.3 clocks; reading x,
making W and issuing the mma take 1.6 either way.

What keeps `coded_decode` from more on an A100: a warp's round moves 4224 bytes, 414 clocks of memory, and makes 8192
values of W, each for one product or two. Eight codes take 20 instructions of the pipe of whole numbers, which does two
in a clock: 320 clocks for the round, with scales and addresses 377. Were there nothing but these 320 and the loads and
mma of 16 rows, it would be at 72 %; 80 % would need values of W that aren't rounded after the product with their scale,
or codes in another order. Up to 8 rows half of the mma are left out.

Of memory, one public figure was held against the model: Marlin's product with 16 rows on an A10, by its chart as fast
as memory allows, is foretold at 79 % by the fitted mean and at 46 % by the sum; what its loop does once a column is
counted every time in that.
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
    COUNTS.write_text(counts_text(), encoding="utf-8")
    counts.cache_clear()
    DOCUMENT.write_text(document(), encoding="utf-8")
