"""Values in groups as whole numbers: w ≈ d q + m, with q in 0..highest and half-precision d and m a group."""

import torch
from torch import Tensor

_REFINEMENTS = 3


def fit(values: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """The best scale d and offset m, [groups, 1] each, as half precision stores them, of values [groups, size].

    The first are those of the least and the greatest value; both are refined by least squares, and the best of three
    refinements is kept.
    """
    least = values.amin(1, keepdim=True)
    d, m = (values.amax(1, keepdim=True) - least) / highest, least
    best_d, best_m = d.half().float(), m.half().float()
    best = torch.full_like(d, torch.inf)
    for _ in range(1 + _REFINEMENTS):
        d, m = d.half().float(), m.half().float()
        codes = nearest(values, d, m, highest)
        error = (d * codes + m - values).square_().sum(1, keepdim=True)
        better = error < best
        best, best_d, best_m = (torch.where(better, a, b) for a, b in ((error, best), (d, best_d), (m, best_m)))
        mean, middle = values.mean(1, keepdim=True), codes.mean(1, keepdim=True)
        spread = (codes - middle).square().sum(1, keepdim=True)
        slope = ((codes - middle) * (values - mean)).sum(1, keepdim=True) / spread.clamp(min=1e-9)
        d = torch.where(spread > 0, slope, d)
        m = mean - d * middle
    return best_d, best_m


def places(values: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """(values − m) / d, where among the codes the values lie; 0 where the scale is 0."""
    inverse = torch.where(d > 0, 1 / d, torch.zeros_like(d))
    return (values - m) * inverse


def nearest(values: Tensor, d: Tensor, m: Tensor, highest: int) -> Tensor:
    """The nearest codes, as floats."""
    return places(values, d, m).round_().clamp_(0, highest)
