"""The nearest matrix of a rank, as the two factors of a LoRA.

    R ≈ B A,   A [rank, in], B [out, rank],   ‖R − B A‖ least

By a singular value decomposition; of a large matrix only the part that a random projection finds, refined by powers
of R Rᵀ, so that the time grows with the rank and not with the sides' product times the shorter one.

Source: Eckart and Young, The Approximation of One Matrix by Another of Lower Rank, 1936; Halko, Martinsson and Tropp,
Finding Structure with Randomness, 2009, arXiv 0909.4061.
"""

import torch
from torch import Tensor

from ftkit.errors import InputError

_SPARE = 16
"""Directions that are looked at beyond the rank."""
_POWERS = 3


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B, float32, of a float `matrix` [out, in]; beyond the matrix' own rank they are zero.

    Both carry the root of the singular values, so that neither is far larger than the other. The same matrix gives
    the same factors. Raises InputError for values that are NaN or infinite.
    """
    values = matrix.detach().float()
    if not bool(values.isfinite().all()):
        raise InputError("merge: expected finite weights, got NaN or infinite ones")
    found = min(rank, *values.shape)
    if found + _SPARE < min(values.shape):
        left = _range(values, found + _SPARE)
        u, s, v = torch.linalg.svd(left.T @ values, full_matrices=False)
        u = left @ u
    else:
        u, s, v = torch.linalg.svd(values, full_matrices=False)
    root = s[:found].sqrt()
    a, b = values.new_zeros(rank, values.shape[1]), values.new_zeros(values.shape[0], rank)
    a[:found], b[:, :found] = root[:, None] * v[:found], u[:, :found] * root
    return a, b


def _range(matrix: Tensor, columns: int) -> Tensor:
    """Orthonormal columns [out, columns] that hold nearly all of what the matrix makes large."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix)
    q: Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(_POWERS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q)[0])[0]
    return q
