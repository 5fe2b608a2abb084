"""8-bit integers with a float scale a row, or with `int8:32` a block of 32; nearly without loss at 8 bits.

    w = s q,   q in -127..127,   s = greatest magnitude / 127

Choose it where memory for half of bfloat16 is there and 4 bits lose too much.

Source: row-wise scales as in Dettmers et al., LLM.int8(), 2022, arXiv 2208.07339.
"""

import torch
from torch import Tensor

from ftkit.kernels.coded_matmul import Coded
from ftkit.quant._scheme import Parts, Scheme, Sides, finite, group_of, slabs, whole_groups

OPTIONS = ("", "32")
# below this a scale loses digits; smaller weights become zero
_LEAST = torch.finfo(torch.float32).tiny


def scheme(option: str = "") -> Scheme:
    """The scheme with a scale a row (no option) or a block of 32."""
    block = group_of("int8", option, ("32",)) if option else 0

    def groups(shape: Sides) -> int:
        return whole_groups("int8", shape, block) if block else 1

    def encode(dense: Tensor) -> dict[str, Tensor]:
        rows, columns = dense.shape
        count = groups((rows, columns))
        codes, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, count)
        for part in slabs(rows, columns):
            values = finite(dense[part].float()).reshape(len(scales[part]), count, columns // count)
            scales[part] = (values.abs().amax(2) / 127).clamp(min=_LEAST)
            codes[part] = (values / scales[part].unsqueeze(2)).round_().to(torch.int8).view(-1, columns)
        return {"codes": codes, "scales": scales}

    def coded(parts: Parts, shape: Sides) -> Coded:
        return Coded(shape=shape, codes=parts["codes"], table=None, group=block or shape[1], scales=parts["scales"])

    def layout(shape: Sides) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"codes": (shape, torch.int8), "scales": ((shape[0], groups(shape)), torch.float32)}

    name = f"int8:{block}" if block else "int8"
    return Scheme(name=name, version=1, layout=layout, encode=encode, coded=coded)
