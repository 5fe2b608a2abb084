"""The gated activation of a feed-forward layer: silu(gate) ⊙ up.

    y = gate / (1 + exp(−gate)) ⊙ up

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv 2002.05202.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.kernels import _gpu, _training, operation


@operation
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [tokens, intermediate] to the same shape."""
    return functional.silu(gate) * up


@swiglu.backend("fused", lambda gate, up: torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad))
def _fused(gate: Tensor, up: Tensor) -> Tensor:
    """Keeps gate and up for the backward pass, and computes silu(gate) again: a third less memory."""
    y: Tensor = _SwiGlu.apply(gate, up)
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, functional.silu(gate).mul_(dy)


def _in_core(gate: Tensor, up: Tensor) -> bool:
    return _training.takes(gate, up)


@swiglu.backend("cpu", _in_core)
def _cpu(gate: Tensor, up: Tensor) -> Tensor:
    """As `fused`, in one pass each way."""
    y: Tensor = _CpuSwiGlu.apply(gate, up)
    return y


class _CpuSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        torch.ops.ftkit.swiglu_forward(gate, up, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        torch.ops.ftkit.swiglu_backward(dy.contiguous(), gate, up, dgate, dup)
        return dgate, dup


@swiglu.backend("cuda", lambda gate, up: _gpu.fits(gate, up))
def _cuda(gate: Tensor, up: Tensor) -> Tensor:
    y: Tensor = _CudaSwiGlu.apply(gate, up)
    return y


class _CudaSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        found: Tensor = _gpu.swiglu(gate, up)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = _gpu.swiglu_backward(dy.contiguous(), *ctx.saved_tensors)
        return dgate, dup
