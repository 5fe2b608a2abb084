"""4-bit codes into a table of 16 numbers, scales of blocks of 64 quantized again: what `nf4` and `fp4` share.

    w = table[code] · a,   a = map[code'] · a' + mean

Blocks of 64 go over the flattened matrix; a is the block's greatest magnitude. The scales, less their mean, are codes
of 8 bits into the dynamic map under one float scale a' a block of 256. Two codes a byte, the first in the high half.
4.127 bits a weight; with the option `single` scales stay floats, and it is 4.5. Codes, scales and decoded values are
those of bitsandbytes to the bit.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv 2305.14314; the dynamic map:
Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2016, arXiv 1511.04561.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ftkit.kernels.coded_matmul import Coded, Nested
from ftkit.quant._scheme import SLAB, Parts, Scheme, Sides, finite

BLOCK, NESTED_BLOCK = 64, 256
OPTIONS = ("", "single")
_STEPS = 65535
_LEAST = 1e-38
"""What smaller block scales are raised to before dividing by them."""


def _dynamic() -> list[float]:
    """The numbers of the dynamic map; each decade down has half as many."""
    numbers: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        numbers += (10 ** (decade - 6) * middles).tolist()
        numbers += (-(10 ** (decade - 6)) * middles).tolist()
    return sorted([*numbers, 0.0, 1.0])


# numbers and no tensor: one that is made first while memory is planned would stay a fake one
_DYNAMIC = _dynamic()


def codebook(name: str, values: Sequence[float], option: str = "") -> Scheme:
    """The scheme of a table of 16 numbers; ones that are equal are one number, and the first code is taken.

    Parts called `table` and `map` stand for the scheme's own numbers, for files that say theirs.
    """
    single = option == "single"
    table = torch.tensor(values, dtype=torch.float32)
    table /= table.abs().max()
    order = table.argsort(stable=True)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    dynamic = dynamic_map()

    def encode(dense: Tensor) -> dict[str, Tensor]:
        flat = dense.reshape(-1)
        codes = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8)
        scales = torch.empty(-(-len(flat) // BLOCK))
        for start in range(0, len(flat), SLAB):
            piece = finite(flat[start : start + SLAB].float())
            whole = len(piece) - len(piece) % BLOCK
            blocks = piece[:whole].view(-1, BLOCK)
            first = start // BLOCK
            scales[first : first + len(blocks)] = blocks.abs().amax(1)
            scaled = blocks * (1 / scales[first : first + len(blocks)].clamp(min=_LEAST)).view(-1, 1)
            scaled = scaled.clamp_(-1, 1).view(-1)
            if whole < len(piece):  # the last block is divided, not multiplied by a rounded inverse
                scales[-1] = piece[whole:].abs().amax().clamp(min=_LEAST)
                scaled = torch.cat([scaled, (piece[whole:] / scales[-1]).clamp_(-1, 1)])
            if len(scaled) % 2:
                scaled = functional.pad(scaled, (0, 1))
            numbers = order[torch.bucketize(scaled, bounds, out_int32=True)].to(torch.uint8)
            codes[start // 2 : start // 2 + len(numbers) // 2] = numbers[::2] << 4 | numbers[1::2]
        if single:
            return {"codes": codes, "scales": scales}
        mean = scales.mean()
        nested, greatest = _encode_scales(scales - mean)
        return {"codes": codes, "scales": nested, "scale_scales": greatest, "scale_mean": mean.view(1)}

    def coded(parts: Parts, shape: Sides) -> Coded:
        device = parts["codes"].device
        nested = None
        if not single:
            numbers = parts["map"] if "map" in parts else dynamic.to(device)
            nested = Nested(map=numbers, greatest=parts["scale_scales"], mean=parts["scale_mean"])
        return Coded(
            shape=shape,
            codes=parts["codes"],
            table=parts["table"] if "table" in parts else table.to(device),
            group=BLOCK,
            scales=parts["scales"],
            nested=nested,
        )

    def layout(shape: Sides) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        count = shape[0] * shape[1]
        blocks = -(-count // BLOCK)
        if single:
            return {"codes": (((count + 1) // 2,), torch.uint8), "scales": ((blocks,), torch.float32)}
        return {
            "codes": (((count + 1) // 2,), torch.uint8),
            "scales": ((blocks,), torch.uint8),
            "scale_scales": ((-(-blocks // NESTED_BLOCK),), torch.float32),
            "scale_mean": ((1,), torch.float32),
        }

    return Scheme(name=f"{name}:{option}" if option else name, version=1, layout=layout, encode=encode, coded=coded)


def dynamic_map() -> Tensor:
    """The 256 numbers of the dynamic map, rising, float32: a sign, a decade, and a linear fraction within it."""
    return torch.tensor(_DYNAMIC)


@functools.cache
def _nearest() -> Tensor:
    """The code nearest to each of the 65,536 numbers that -1..1 is first rounded to, uint8.

    This first rounding is how bitsandbytes' CPU backend finds codes; the numbers next to zero are never found.
    """
    numbers, table = torch.arange(_STEPS + 1) * (2 / _STEPS) - 1, dynamic_map()
    right = torch.searchsorted(table, numbers).clamp(max=255)
    left = (right - 1).clamp(min=0)
    return torch.where(table[right] - numbers < numbers - table[left], right, left).to(torch.uint8)


def _encode_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [n] to codes uint8 [n] and the greatest magnitude of each block of 256; a block of zeros has codes 0."""
    count = len(values)
    blocks = functional.pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    greatest = blocks.abs().amax(1, keepdim=True)
    scaled = (blocks * (1 / greatest.clamp(min=_LEAST))).clamp_(-1, 1)
    codes = _nearest()[((scaled + 1) * (_STEPS / 2) + 0.5).int()]
    return torch.where(greatest > 0, codes, torch.zeros_like(codes)).view(-1)[:count], greatest.view(-1)
