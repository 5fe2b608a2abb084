"""A frozen linear layer with a low-rank matrix beside it.

    y = x Wᵀ + s (x Aᵀ) Bᵀ

    h = x Aᵀ        dh = s dy B        dA = dhᵀ x        dB = s dyᵀ h        dx = dy W + dh A

The gradient of W is never formed, x is kept once, and of the low-rank path only h [tokens, rank].
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.cuda import launches
from ftkit.kernels import _gpu, operation
from ftkit.kernels.coded_matmul import Coded, arguments, coded_lora, coded_lora_dx


class Frozen(Protocol):
    """W, in whatever way it is stored."""

    def matmul(self, x: Tensor) -> Tensor:
        """x Wᵀ"""

    def matmul_transposed(self, dy: Tensor) -> Tensor:
        """dy W"""


@operation
def lora_linear(x: Tensor, weight: Frozen, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x [tokens, in], W [out, in], A [rank, in] and B [out, rank] to [tokens, out] in x's dtype; A and B are rounded
    to it."""
    return weight.matmul(x) + scale * functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))


@lora_linear.backend("fused", lambda x, *_: x.ndim == 2)
def _fused(x: Tensor, weight: Frozen, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The products added in place, forward and backward."""
    y: Tensor = _LoraLinear.apply(x, weight, a.to(x.dtype), b.to(x.dtype), scale)
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Frozen, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = functional.linear(x, a)  # [tokens, rank]
        ctx.save_for_backward(x, a, b, low)
        ctx.weight, ctx.scale = weight, scale
        return weight.matmul(x).addmm_(low, b.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, _ = ctx.needs_input_grad
        dlow = (dy @ b).mul_(ctx.scale) if needs_x or needs_a else None  # [tokens, rank]
        db = (dy.T @ low).mul_(ctx.scale) if needs_b else None
        da = dlow.T @ x if needs_a and dlow is not None else None
        dx = ctx.weight.matmul_transposed(dy).addmm_(dlow, a) if needs_x else None
        return dx, None, da, db, None


def codes_of(weight: Frozen) -> Coded | None:
    """W as codes, where it is stored so."""
    found = getattr(weight, "coded", None)
    return found if isinstance(found, Coded) else None


def _in_one_kernel(x: Tensor, weight: Frozen, a: Tensor, b: Tensor, scale: float) -> bool:  # noqa: ARG001
    coded = codes_of(weight)
    known = coded is not None and launches.takes_matmul(x, coded) and launches.takes_tiles(x, coded)
    return known and x.ndim == 2 and _gpu.fits(x, a.to(x.dtype), b.to(x.dtype))


@lora_linear.backend("cuda", _in_one_kernel)
def _cuda(x: Tensor, weight: Frozen, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The low-rank product added where W's is summed: W dequantized in registers, y and dx written once."""
    y: Tensor = _CudaLoraLinear.apply(x, codes_of(weight), a.to(x.dtype), b.to(x.dtype), scale)
    return y


class _CudaLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coded: Coded, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = functional.linear(x, a)  # [tokens, rank]
        ctx.save_for_backward(x, a, b, low)
        ctx.coded, ctx.scale = coded, scale
        found: Tensor = coded_lora(x, low * scale, b, *arguments(coded))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        dlow = (dy @ b).mul_(ctx.scale) if needs_x or needs_a else None  # [tokens, rank]
        db = (dy.T @ low).mul_(ctx.scale) if needs_b else None
        da = dlow.T @ x if needs_a and dlow is not None else None
        dx = coded_lora_dx(dy, dlow, a, *arguments(ctx.coded)) if needs_x else None
        return dx, None, da, db, None
