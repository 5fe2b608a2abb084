"""4-bit integers with a bfloat16 scale and a whole zero point a group of 64, 32 or 128; 4.38 bits, for other runtimes.

    w = s (q - z),   q and z in 0..15

These are the numbers of compressed-tensors' `pack-quantized` files (W4A16), which transformers and vLLM read. `int4`
has groups of 64 along the input, `int4:32` and `int4:128` those sizes. Scale and zero point are searched: the range of
a group is drawn in by steps, scales are fitted by least squares, and the pair of the least error is kept. The range
always holds 0, which stays exact; `int4_group`, whose offset is a float, follows groups that lie beside it. Choose this
one for what those runtimes read.

Source: uniform affine quantization as in Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, 2018, arXiv 1712.05877.
"""

import torch
from torch import Tensor

from ftkit.errors import InputError
from ftkit.kernels.coded_matmul import Coded
from ftkit.quant._scheme import Parts, Scheme, Sides, finite, group_of, slabs, whole_groups

OPTIONS = ("", "32", "64", "128")
_HIGHEST = 15
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that are tried; a narrower one clips the ends and is finer between."""

_LIMIT = 1e15
"""Above it squared errors may overflow."""


def scheme(option: str = "") -> Scheme:
    """The scheme with groups of 64, or of the size that the option says."""
    group = group_of("int4", option or "64", OPTIONS[1:])

    def encode(dense: Tensor) -> dict[str, Tensor]:
        rows, columns = dense.shape
        groups = whole_groups("int4", (rows, columns), group)
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        scales = torch.empty(rows, groups, dtype=torch.bfloat16)
        zeros = torch.empty(rows, groups, dtype=torch.uint8)
        for part in slabs(rows, columns):
            values = finite(dense[part].float()).reshape(-1, group)
            if values.numel() and float(values.abs().amax()) > _LIMIT:
                raise InputError(f"int4: expected weights of at most {_LIMIT:g}, got {values.abs().amax():g}")
            s, z = _fit(values)
            numbers = _codes(values, s, z).to(torch.uint8).view(-1, columns)
            codes[part] = numbers[:, ::2] << 4 | numbers[:, 1::2]
            scales[part], zeros[part] = s.view(-1, groups).bfloat16(), z.view(-1, groups).to(torch.uint8)
        return {"codes": codes, "scales": scales, "zeros": zeros}

    def coded(parts: Parts, shape: Sides) -> Coded:
        table = torch.arange(_HIGHEST + 1, dtype=torch.float32, device=parts["codes"].device)
        # s q and s z have few digits, so that s q - s z is s (q - z) to the bit
        scales = parts["scales"].float()
        offsets = scales * parts["zeros"].float().neg_()
        return Coded(shape=shape, codes=parts["codes"], table=table, group=group, scales=scales, offsets=offsets)

    def layout(shape: Sides) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        groups = whole_groups("int4", shape, group)
        return {
            "codes": ((shape[0], shape[1] // 2), torch.uint8),
            "scales": ((shape[0], groups), torch.bfloat16),
            "zeros": ((shape[0], groups), torch.uint8),
        }

    name = f"int4:{option}" if option else "int4"
    return Scheme(name=name, version=1, layout=layout, encode=encode, coded=coded)


def _fit(values: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale, as bfloat16 holds it, and zero point, [groups, 1] each, of values [groups, size]."""
    low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    best_s, best_z = torch.ones_like(low), torch.zeros_like(low)
    best = torch.full_like(low, torch.inf)
    for share in _RANGES:
        s = share * (high / _HIGHEST - low / _HIGHEST)
        z = (-share * low / s).nan_to_num_(0, 0, 0).round_().clamp_(0, _HIGHEST)
        for _ in range(2):
            s = s.bfloat16().float()
            s = torch.where(s > 0, s, 1)  # a group of zeros; readers may divide by its scale
            steps = _codes(values, s, z) - z
            error = (s * steps - values).square_().sum(1, keepdim=True)
            better = error < best
            best, best_s, best_z = (torch.where(better, a, b) for a, b in ((error, best), (s, best_s), (z, best_z)))
            s = (steps * values).sum(1, keepdim=True) / steps.square().sum(1, keepdim=True).clamp(min=1)
    return best_s, best_z


def _codes(values: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """The nearest codes, as floats."""
    return (values / s + z).round_().clamp_(0, _HIGHEST)
