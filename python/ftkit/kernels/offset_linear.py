"""A linear layer whose weight has a stored offset for each group of inputs, and a low-rank matrix that moves them.

    m' = half(m + s B A)                 offsets [out, groups], A [rank, groups], B [out, rank]
    y = x W'ᵀ,  W' = W with m' for m

    dx = dy W'        dm = dyᵀ p,  p = x summed over each group        dA = s Bᵀ dm        dB = s dm Aᵀ

The offsets are rounded as they will be stored, and the gradient passes straight through the rounding. s B A is summed
in float64, so that every machine and every order of summation rounds to the same half. Of x only the sums p
[tokens, groups] are kept; W' is made again in the backward pass.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.kernels import operation


class Stored(Protocol):
    """W, in a way that has offsets."""

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ"""

    def matmul_transposed(self, dy: Tensor) -> Tensor:
        """dy W"""

    def dense(self) -> Tensor:
        """W"""


class Offsets(Protocol):
    """The offsets of such a W."""

    @property
    def group(self) -> int:
        """Inputs that share an offset."""

    @property
    def values(self) -> Tensor:
        """m, float16 [out, groups]."""

    @property
    def replace(self) -> Callable[[Tensor], Stored]:
        """m' → W'."""


def moved(offsets: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """m', float16 [out, groups], of m, A and B."""
    return (offsets.double() + scale * (b.detach().double() @ a.detach().double())).half()


@operation
def offset_linear(x: Tensor, offsets: Offsets, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x [tokens, in] to [tokens, out]; A [rank, groups] and B [out, rank] in float32 at least."""
    stored = offsets.replace(moved(offsets.values, a, b, scale)).dense()
    delta = scale * (b @ a)  # [out, groups]
    straight = (delta - delta.detach()).to(x.dtype)  # zeros, with the gradient of delta
    return functional.linear(x, stored + straight.repeat_interleave(offsets.group, 1))


@offset_linear.backend("fused", lambda x, *_: x.ndim == 2)
def _fused(x: Tensor, offsets: Offsets, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Gradients by the sums over groups, without the gradient of W'."""
    y: Tensor = _OffsetLinear.apply(x, offsets, a, b, scale)
    return y


class _OffsetLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Offsets, a: Tensor, b: Tensor, scale: float) -> Tensor:
        sums = x.unflatten(1, (-1, offsets.group)).sum(2)  # [tokens, groups]
        ctx.save_for_backward(sums, a, b)
        ctx.offsets, ctx.scale = offsets, scale
        return offsets.replace(moved(offsets.values, a, b, scale)).matmul(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        sums, a, b = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, _ = ctx.needs_input_grad
        da = db = dx = None
        if needs_a:
            low = (dy @ b.to(dy.dtype)).mul_(ctx.scale)  # [tokens, rank]
            da = (low.T @ sums).to(a.dtype)
        if needs_b:
            low = (sums @ a.to(sums.dtype).T).mul_(ctx.scale)  # [tokens, rank]
            db = (dy.T @ low).to(b.dtype)
        if needs_x:
            dx = ctx.offsets.replace(moved(ctx.offsets.values, a, b, ctx.scale)).matmul_transposed(dy)
        return dx, None, da, db, None
