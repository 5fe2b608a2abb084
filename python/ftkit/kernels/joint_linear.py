"""A linear layer whose weight and low-rank matrix are quantized together, with a learned step and offset a group.

    V = W + s B A                                  [out, in], A [rank, in], B [out, rank]
    d = half(exp ρ),  m = half(−d z)               steps and offsets [out, groups], of trained ρ and z
    u = (V − m) / d,  q = clamp(round u, 0, highest)
    y = x Ŵᵀ,  Ŵ = d q + m

    dŴ = dyᵀ x         dV = dŴ inside, 0 outside;   inside: where round u is no less than 0 and no more than highest
    dA = s Bᵀ dV       dB = s dV Aᵀ       dx = dy Ŵ
    dd = Σ_group dŴ (q − u inside, q outside) − z dm       dm = Σ_group dŴ outside
    dρ = exp(ρ) dd     dz = −d dm

The gradient passes straight through every rounding. s B A is summed in float64 and then rounded, so that machines,
threads and orders of summation agree on the codes. Of the forward pass only x is kept: W, V and Ŵ are made again in
the backward pass, a few rows at a time where they can be.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.kernels import operation
from ftkit.kernels._groups import places
from ftkit.kernels.block_matmul import block_matmul

LEAST_STEP = 2.0**-20
"""The smallest step that is stored: 16 times the smallest half."""

_SLAB = 1 << 18
"""Values that are quantized at a time: they stay in the processor's caches."""


class Dense(Protocol):
    """W, in whatever way it is stored."""

    def dense(self) -> Tensor:
        """W as a plain tensor."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained of a layer, in float32 at least."""

    a: Tensor
    """A [rank, in]"""
    b: Tensor
    """B [out, rank]"""
    log_steps: Tensor
    """ρ [out · groups]"""
    zero_points: Tensor
    """z [out · groups]"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is not."""

    highest: int
    """The greatest code."""
    group: int
    """Inputs that share a step and an offset."""
    scale: Tensor
    """s, float64, of no dimension."""


def stored(trained: Trained) -> tuple[Tensor, Tensor]:
    """d and m, float16 [out, groups], as a file holds them."""
    rows = trained.b.shape[0]
    d = trained.log_steps.detach().double().exp().clamp_(min=LEAST_STEP).half()
    m = (d.double() * trained.zero_points.detach().double()).neg_().half()
    return d.view(rows, -1), m.view(rows, -1)


def codes(weight: Dense, trained: Trained, grid: Grid) -> Tensor:
    """q, uint8 [out, in]."""
    w = weight.dense()
    found = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for rows, u in _places(w, trained, grid):
        found[rows] = u.round_().clamp_(0, grid.highest).flatten(1)
    return found


@operation
def joint_linear(x: Tensor, weight: Dense, trained: Trained, grid: Grid) -> Tensor:
    """x [tokens, in] to [tokens, out]."""
    d, m = (part.to(trained.a.dtype).unsqueeze(2) for part in stored(trained))
    steps = trained.log_steps.exp().view_as(d)
    d = _as(d, steps)
    m = _as(m, -d * trained.zero_points.view_as(d))
    delta = (trained.b.double() @ trained.a.double()) * grid.scale
    v = (weight.dense() + delta).to(d.dtype).unflatten(1, (-1, grid.group))
    u = places(v, d, m)
    rounded = u.detach().round()
    q = rounded.clamp(0, grid.highest)
    q = _as(q, u * (rounded == q))
    exact = (d.detach().float() * q.detach().float() + m.detach().float()).to(d.dtype)
    return functional.linear(x, _as(exact, d * q + m).flatten(1).to(x.dtype))


def _as(value: Tensor, soft: Tensor) -> Tensor:
    """The value, with the gradient of `soft`."""
    return value + (soft - soft.detach())


@joint_linear.backend("fused", lambda x, *_: x.ndim == 2)
def _fused(x: Tensor, weight: Dense, trained: Trained, grid: Grid) -> Tensor:
    """Gradients by the formulas above."""
    parts = trained.a, trained.b, trained.log_steps, trained.zero_points
    y: Tensor = _JointLinear.apply(x, *parts, weight, grid)
    return y


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, log_steps: Tensor, zero_points: Tensor, weight: Dense, grid: Grid
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, log_steps, zero_points)
        ctx.weight, ctx.grid = weight, grid
        trained = Trained(a=a, b=b, log_steps=log_steps, zero_points=zero_points)
        d, m = (part.float().unsqueeze(2) for part in stored(trained))
        w = weight.dense()
        quantized = x.new_empty(w.shape)
        for rows, u in _places(w, trained, grid):
            quantized[rows] = _decoded(u.round_().clamp_(0, grid.highest), d[rows], m[rows])
        if quantized.dtype == torch.float32 and quantized.device.type == "cpu":  # as a dense weight of these values
            return block_matmul(x, "f32", quantized.view(torch.uint8))
        return functional.linear(x, quantized)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, log_steps, zero_points = ctx.saved_tensors
        grid = ctx.grid
        trained = Trained(a=a, b=b, log_steps=log_steps, zero_points=zero_points)
        halves = stored(trained)
        d, m = (part.float().unsqueeze(2) for part in halves)
        w = ctx.weight.dense()
        quantized = x.new_empty(w.shape) if ctx.needs_input_grad[0] else None
        dv = (dy.T @ x).to(a.dtype)  # dŴ, and in place dV
        dd, dm = (torch.empty(halves[0].shape, dtype=a.dtype, device=x.device) for _ in range(2))
        for rows, u in _places(w, trained, grid):
            slope = dv[rows].view_as(u)
            rounded = u.round()
            q = rounded.clamp(0, grid.highest)
            inside = rounded == q
            dd[rows] = (q - u.mul_(inside)).mul_(slope).sum(2)
            whole = slope.sum(2)
            slope.mul_(inside)
            dm[rows] = whole - slope.sum(2)
            if quantized is not None:
                quantized[rows] = _decoded(q, d[rows], m[rows])
        dd, dm = dd.view(-1), dm.view(-1)
        dlog_steps = dd.addcmul_(zero_points, dm, value=-1).mul_(log_steps.exp())
        dzero_points = dm.mul_(halves[0].view(-1)).neg_()
        scale = grid.scale.to(a.dtype)
        da, db = (b.T @ dv).mul_(scale), (dv @ a.T).mul_(scale)
        dx = None if quantized is None else dy @ quantized
        return dx, da, db, dlog_steps, dzero_points, None, None


def _places(w: Tensor, trained: Trained, grid: Grid) -> Iterator[tuple[slice, Tensor]]:
    """u of some rows [rows, groups, group], all rows in turn; the caller may write into it."""
    wide = trained.a.dtype
    d, m = (part.to(wide).unsqueeze(2) for part in stored(trained))
    a, b = (trained.a.detach().double(), trained.b.detach().double() * grid.scale)
    step = max(1, _SLAB // w.shape[1])
    for start in range(0, w.shape[0], step):
        rows = slice(start, min(start + step, w.shape[0]))
        v = (b[rows] @ a).add_(w[rows]).to(wide)
        yield rows, places(v.unflatten(1, (-1, grid.group)), d[rows], m[rows])


def _decoded(q: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """d q + m in float32, as whoever reads the file computes it."""
    return (q.float() * d).add_(m).flatten(1)
