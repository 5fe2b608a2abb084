"""Rotary position embedding of queries or keys.

With the two halves x = [a, b] of a head, and the angle table of the token's position:

    y = [a cos − b sin, b cos + a sin]

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv 2104.09864; halves
instead of neighbouring pairs, as in published safetensors.
"""

import torch
from torch import Tensor

from ftkit.kernels import operation


@operation
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim], cos and sin [tokens, head_dim / 2] in x's dtype, to x's shape."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [tokens, 1, head_dim / 2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
