"""8-bit floats (4 bits of exponent, 3 of fraction) with a float scale a row; for weights of very unequal sizes.

    w = s f,   f in -448..448,   s = greatest magnitude / 448

Each weight keeps about a digit however small it is beside the row's greatest, where `int8` keeps two of the greatest
ones and none of the smallest.

Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv 2209.05433.
"""

import torch
from torch import Tensor

from ftkit.kernels.coded_matmul import Coded
from ftkit.quant._scheme import Parts, Scheme, Sides, finite, slabs

OPTIONS = ("",)
_GREATEST = 448.0
# below this a scale loses digits; smaller weights become zero
_LEAST = torch.finfo(torch.float32).tiny


def scheme(option: str = "") -> Scheme:  # noqa: ARG001
    """The scheme; there is no option."""

    def encode(dense: Tensor) -> dict[str, Tensor]:
        codes, scales = torch.empty(dense.shape, dtype=torch.float8_e4m3fn), torch.empty(dense.shape[0], 1)
        for part in slabs(*dense.shape):
            values = finite(dense[part].float())
            scales[part] = (values.abs().amax(1, keepdim=True) / _GREATEST).clamp(min=_LEAST)
            # a rounded scale may put the greatest value a hair above 448, which has no code
            codes[part] = (values / scales[part]).clamp_(-_GREATEST, _GREATEST).to(torch.float8_e4m3fn)
        return {"codes": codes, "scales": scales}

    def coded(parts: Parts, shape: Sides) -> Coded:
        return Coded(shape=shape, codes=parts["codes"], table=None, group=shape[1], scales=parts["scales"])

    def layout(shape: Sides) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"codes": (shape, torch.float8_e4m3fn), "scales": ((shape[0], 1), torch.float32)}

    return Scheme(name="fp8_e4m3", version=1, layout=layout, encode=encode, coded=coded)
