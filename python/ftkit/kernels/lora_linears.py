"""Frozen linear layers of the same inputs, each with a low-rank matrix beside it.

    y_i = x W_iᵀ + s_i (x A_iᵀ) B_iᵀ

    h_i = x A_iᵀ    d_i = s_i dy_i B_i    dA_i = d_iᵀ x    dB_i = s_i dy_iᵀ h_i    dx = Σ_i dy_i W_i + d_i A_i

x is kept once for all of them, or not at all where it is cheap to make again (`Origin`). In float32 products with W
are the weights' own, so a row without an adapter, or under one that adds nothing, has the same bits. In bfloat16 the
core has the low ranks as a few more columns of the same products, and rounds y and dx once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftkit.kernels import _training, operation
from ftkit.kernels.block_matmul import multiplies
from ftkit.kernels.coded_matmul import Coded, takes
from ftkit.kernels.lora_linear import Frozen, codes_of, lora_linear

Low = tuple[Tensor, Tensor, float]
"""(A [rank, in], B [out, rank], s)"""


@dataclass(frozen=True)
class Origin:
    """What x was made of: tensors that the backward pass has anyway, and a pass over them that gives x's bits again."""

    make: Callable[..., Tensor]
    of: tuple[Tensor, ...]


@operation
def lora_linears(
    x: Tensor,
    weights: Sequence[Frozen],
    lows: Sequence[Low],
    origin: Origin | None = None,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    """x [tokens, in], and of each layer W [out, in] and its low-rank part, to [tokens, out] of each.

    A backend may keep x's origin for the backward pass instead of x.
    """
    return tuple(lora_linear(x, weight, *low) for weight, low in zip(weights, lows, strict=True))


@lora_linears.backend("cpu", lambda x, weights, lows, *_: _in_core(x, weights, lows))
def _cpu(x: Tensor, weights: Sequence[Frozen], lows: Sequence[Low], origin: Origin | None = None) -> tuple[Tensor, ...]:
    parts = [part for low in lows for part in low[:2]]
    found: tuple[Tensor, ...] = _LoraLinears.apply(x, origin, weights, [low[2] for low in lows], *parts)
    return found


@lora_linear.backend("cpu", lambda x, weight, a, b, scale: _in_core(x, [weight], [(a, b, scale)]))
def _one(x: Tensor, weight: Frozen, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """A layer alone."""
    return _cpu(x, [weight], [(a, b, scale)])[0]


def _in_core(x: Tensor, weights: Sequence[Frozen], lows: Sequence[Low]) -> bool:
    parts = [part for low in lows for part in low[:2]]
    if x.ndim != 2 or x.device.type != "cpu" or not _training.takes(*parts) or parts[0].dtype != torch.float32:
        return False
    if x.dtype == torch.float32:
        return True
    if sum(a.shape[1] * b.shape[0] for a, b, _ in lows) > _training.AT_ONCE:
        return False
    return all(multiplies(x, getattr(weight, "training", False)) and _given(weight) is not None for weight in weights)


def _given(weight: Frozen) -> Coded | tuple[str, Tensor] | None:
    """W as the core multiplies bfloat16 with it; None for what it doesn't, or what is let go after each product."""
    coded = codes_of(weight)
    if coded is not None:
        return coded if takes(coded) else None
    stored = None if getattr(weight, "streamed", False) else getattr(weight, "stored", lambda: None)()
    return stored if isinstance(stored, tuple) else None


def _frozen(weights: Sequence[Frozen]) -> list[_training.Frozen]:
    """All of them, of which `_given` says something."""
    found = [one.core() if isinstance(one, Coded) else one for one in map(_given, weights)]
    return [one for one in found if one is not None]


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, origin: Origin | None, weights: Sequence[Frozen], scales: list[float], *parts: Tensor
    ) -> Any:
        x = x.contiguous()
        a, b = ([part.contiguous() for part in side] for side in (parts[::2], parts[1::2]))
        low = [x.new_empty(x.shape[0], part.shape[0]) for part in a]
        if x.dtype == torch.float32:
            y = [weight.matmul(x) for weight in weights]
            torch.ops.ftkit.lora_forward(x, a, b, scales, y, low)
        else:
            y = [x.new_empty(x.shape[0], part.shape[0]) for part in b]
            _training.with_frozen(_training.low_rank_forward, partial(_frozen, weights), x, a, b, scales, y, low)
        ctx.save_for_backward(*a, *b, *low, *([x] if origin is None else origin.of))
        ctx.make = None if origin is None else origin.make
        ctx.weights, ctx.scales = weights, scales
        return tuple(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        count = len(dys)
        kept = ctx.saved_tensors
        a, b, low = (list(kept[start : start + count]) for start in (0, count, 2 * count))
        of = kept[3 * count :]
        dy = [one.contiguous() for one in dys]
        trained = any(ctx.needs_input_grad[4:])
        halves = dy[0].dtype == torch.bfloat16
        dx = None
        if ctx.needs_input_grad[0] and halves:
            dx = dy[0].new_empty(dy[0].shape[0], a[0].shape[1])
        elif ctx.needs_input_grad[0]:
            dx = ctx.weights[0].matmul_transposed(dy[0])
            for weight, one in zip(ctx.weights[1:], dy[1:], strict=True):
                dx += weight.matmul_transposed(one)
        x = of[0] if ctx.make is None else ctx.make(*of).contiguous()
        da = [torch.empty_like(one) for one in a] if trained else []
        db = [torch.empty_like(one) for one in b] if trained else []
        if halves:
            frozen = partial(_frozen, ctx.weights)
            _training.with_frozen(_training.low_rank_backward, frozen, x, a, b, ctx.scales, dy, low, da, db, dx)
        else:
            dlow = [torch.empty_like(one) for one in low]
            torch.ops.ftkit.lora_backward(x, a, b, ctx.scales, dy, low, dlow, da, db, dx)
        gradients = [part for pair in zip(da, db, strict=True) for part in pair] if trained else [None] * (2 * count)
        return dx, None, None, None, *gradients
