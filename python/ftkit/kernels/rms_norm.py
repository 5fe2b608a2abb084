"""Root-mean-square normalisation over the last axis.

    y = weight ⊙ x / √(mean(x²) + ε)

The mean and the division are computed in float32 (float64 for float64), the product with the weight in x's dtype: the
order of roundings that published weights were trained with.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv 1910.07467.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftkit.kernels import _gpu, _training, operation


@operation
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., d] and weight [d] to [..., d] in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)  # [..., 1]
    return weight * (wide * scale).to(x.dtype)


@rms_norm.backend("fused", lambda x, weight, epsilon: torch.is_grad_enabled() and x.requires_grad)  # noqa: ARG005
def _fused(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Keeps x and one number a row for the backward pass, instead of three tensors of x's size.

    n = x / √(mean(x²) + ε)      dx = (g − n mean(g n)) / √(mean(x²) + ε)  with g = weight ⊙ dy      dweight = Σ dy n
    """
    y: Tensor = _RmsNorm.apply(x, weight, epsilon)
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon))  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = (x.to(scale.dtype) * scale).to(x.dtype)
        dweight = (dy * normal).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        slope = (dy * weight).to(scale.dtype)
        along = (slope * normal).mean(-1, keepdim=True)  # [..., 1]
        dx = slope.sub_(normal * along).mul_(scale).to(x.dtype)
        return dx, dweight, None


def _in_core(x: Tensor, weight: Tensor, epsilon: float) -> bool:  # noqa: ARG001
    return _training.takes(x, weight)


@rms_norm.backend("cpu", _in_core)
def _cpu(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `fused`, in one pass each way."""
    y: Tensor = _CpuRmsNorm.apply(x, weight, epsilon)
    return y


class _CpuRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        y, roots = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        torch.ops.ftkit.rms_norm_forward(x, weight, epsilon, y, roots)
        ctx.save_for_backward(x, weight, roots)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, roots = ctx.saved_tensors
        dx = torch.empty_like(x)
        torch.ops.ftkit.rms_norm_backward(dy.contiguous(), x, weight, roots, dx)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (x * roots.unsqueeze(-1)).mul_(dy).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dweight, None


@rms_norm.backend("cuda", lambda x, weight, epsilon: x.ndim > 1 and x.shape[-1] % 8 == 0 and _gpu.fits(x, weight))  # noqa: ARG005
def _cuda(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    y: Tensor = _CudaRmsNorm.apply(x.view(-1, x.shape[-1]), weight, epsilon)
    return y.view(x.shape)


class _CudaRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, scales = _gpu.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scales)
        found: Tensor = y
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scales = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _gpu.rms_norm_dx(dy, x, weight, scales) if ctx.needs_input_grad[0] else None
        dweight = _gpu.rms_norm_dweight(dy, x, scales).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight, None
