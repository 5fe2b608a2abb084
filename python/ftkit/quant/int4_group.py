"""4-bit integers with a half-precision scale and offset a group of 64, 32 or 128 along the input; 4.5 bits at 64.

    w = d q + m,   q in 0..15

The offset is a float, not an integer zero point: whatever is constant inside a group can be added to it (`qalora` does
so). GGUF's Q4_1 holds the same numbers, a group of 64 or 128 as blocks of 32 with one scale and offset. `int4_group`
has groups of 64, `int4_group:32` and `int4_group:128` those sizes. Codes are the nearest ones under scale and offset
as they are stored; both are refined by least squares, and the best of three refinements is kept.

Source: group-wise asymmetric quantization as in Xu et al., QA-LoRA, 2023, arXiv 2309.14717.
"""

import torch
from torch import Tensor

from ftkit.errors import InputError
from ftkit.kernels._groups import fit, nearest
from ftkit.kernels.coded_matmul import Coded
from ftkit.quant._scheme import Parts, Scheme, Sides, finite, group_of, slabs, whole_groups

OPTIONS = ("", "32", "64", "128")
_HIGHEST = 15
_BLOCK = 32
"""Values in a block of Q4_1: half-precision scale and offset, then value i in the low, i + 16 in the high half of a
byte."""
_LIMIT = torch.finfo(torch.float16).max


def scheme(option: str = "") -> Scheme:
    """The scheme with groups of 64, or of the size that the option says."""
    group = group_of("int4_group", option or "64", OPTIONS[1:])

    def encode(dense: Tensor) -> dict[str, Tensor]:
        rows, columns = dense.shape
        groups = whole_groups("int4_group", (rows, columns), group)
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        scales, offsets = (torch.empty(rows, groups, dtype=torch.float16) for _ in range(2))
        for part in slabs(rows, columns):
            values = finite(dense[part].float()).reshape(-1, group)
            if values.numel() and float(values.abs().amax()) > _LIMIT / 2:
                raise InputError(f"int4_group: expected weights of at most {_LIMIT / 2:g}, got {values.abs().amax():g}")
            d, m = fit(values, _HIGHEST)
            numbers = nearest(values, d, m, _HIGHEST).to(torch.uint8).view(-1, columns)
            codes[part] = numbers[:, ::2] << 4 | numbers[:, 1::2]
            scales[part], offsets[part] = d.view(-1, groups), m.view(-1, groups)
        return {"codes": codes, "scales": scales, "offsets": offsets}

    def coded(parts: Parts, shape: Sides) -> Coded:
        table = torch.arange(_HIGHEST + 1, dtype=torch.float32, device=parts["codes"].device)
        scales, offsets = parts["scales"], parts["offsets"]
        return Coded(shape=shape, codes=parts["codes"], table=table, group=group, scales=scales, offsets=offsets)

    def layout(shape: Sides) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        groups = whole_groups("int4_group", shape, group)
        return {
            "codes": ((shape[0], shape[1] // 2), torch.uint8),
            "scales": ((shape[0], groups), torch.float16),
            "offsets": ((shape[0], groups), torch.float16),
        }

    def blocks(parts: Parts) -> tuple[str, Tensor]:
        rows, half = parts["codes"].shape
        pairs = parts["codes"].view(rows, -1, _BLOCK // 2)
        codes = torch.stack((pairs >> 4, pairs & 15), -1).view(rows, -1, _BLOCK)
        found = torch.empty(rows, 2 * half // _BLOCK, 4 + _BLOCK // 2, dtype=torch.uint8, device=codes.device)
        for place, part in ((0, parts["scales"]), (2, parts["offsets"])):
            each = part.repeat_interleave(group // _BLOCK, 1).unsqueeze(2)
            found[..., place : place + 2] = each.view(torch.uint8)
        found[..., 4:] = codes[..., : _BLOCK // 2] | codes[..., _BLOCK // 2 :] << 4
        return "q4_1", found.view(rows, -1)

    name = f"int4_group:{option}" if option else "int4_group"
    return Scheme(name=name, version=1, layout=layout, encode=encode, coded=coded, group=group, blocks=blocks)
