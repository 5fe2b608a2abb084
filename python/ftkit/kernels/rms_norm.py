"""Root-mean-square normalisation over the last axis.

    y = weight ⊙ x / √(mean(x²) + ε)

The mean and the division are computed in float32 (float64 for float64), the product with the weight in x's dtype: the
order of roundings that published weights were trained with.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv 1910.07467.
"""

import torch
from torch import Tensor

from ftkit.kernels import operation


@operation
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., d] and weight [d] to [..., d] in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)  # [..., 1]
    return weight * (wide * scale).to(x.dtype)
