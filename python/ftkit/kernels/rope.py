"""Rotary position embedding of queries or keys.

With the two halves x = [a, b] of a head, and the angle table of the token's position:

    y = [a cos − b sin, b cos + a sin]

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv 2104.09864; halves
instead of neighbouring pairs, as in published safetensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ftkit.kernels import _gpu, _training, operation


@operation
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim], cos and sin [tokens, head_dim / 2] in x's dtype, to x's shape."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [tokens, 1, head_dim / 2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@rope.backend("cpu", lambda x, cos, sin: _training.takes(x, cos, sin))
def _cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In one pass each way."""
    y: Tensor = _CpuRope.apply(x, cos, sin)
    return y


class _CpuRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x)
        torch.ops.ftkit.rotate(x, cos, sin, False, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        torch.ops.ftkit.rotate(dy.contiguous(), *ctx.saved_tensors, True, dx)
        return dx, None, None


@rope.backend("cuda", lambda x, cos, sin: x.shape[-1] % 16 == 0 and _gpu.fits(x, cos, sin))
def _cuda(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y: Tensor = _CudaRope.apply(x, cos, sin)
    return y


class _CudaRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        found: Tensor = _gpu.rope(x, cos, sin, False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _gpu.rope(dy.contiguous(), *ctx.saved_tensors, True), None, None
