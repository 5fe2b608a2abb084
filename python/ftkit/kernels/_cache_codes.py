"""Keys and values in 8 bits: a head of D numbers is D codes and a float32 scale for each block of 32 of them.

    scale = max |x| / 127,   code = round(x / scale),   x ≈ scale · code

A record has the codes first. This is the twin in torch of what the core keeps, to the bit; a block with what is no
number decodes to none. Rounding to the nearest of 255 codes is off by at most 0.4 % of a block's largest number.
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 32
"""Numbers of a head that share a scale."""


def record_bytes(head_dim: int) -> int:
    """Bytes that a head takes."""
    return head_dim + 4 * -(-head_dim // BLOCK)


def encode(x: Tensor) -> Tensor:
    """Numbers [..., D] to records uint8 [..., bytes]."""
    size = x.shape[-1]
    blocks = functional.pad(x.float(), (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    codes = (blocks / torch.where(scales == 0, 1, scales)).round().nan_to_num(0)
    codes = codes.flatten(-2)[..., :size].to(torch.int8).view(torch.uint8)
    return torch.cat([codes, scales.squeeze(-1).contiguous().view(torch.uint8)], -1)


def decode(records: Tensor, head_dim: int) -> Tensor:
    """Records uint8 [..., bytes] to float32 [..., D]."""
    codes = records[..., :head_dim].contiguous().view(torch.int8).float()
    scales = records[..., head_dim:].clone().contiguous().view(torch.float32)
    return codes * scales.repeat_interleave(BLOCK, -1)[..., :head_dim]
