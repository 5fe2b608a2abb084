"""The loss of predicting tokens, from logits, and its gradient.

    loss_t = log Σ_v exp(z_tv) − z_t,target            ∂loss_t / ∂z_tv = softmax(z_t)_v − [v = target]

Computed in float32 (float64 for float64).
"""

import torch
from torch import Tensor

from ftkit.kernels import _gpu, _training, operation


@operation
def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor | None]:
    """logits [rows, V] and targets i64 [rows] to (losses [rows], the gradient [rows, V] in the logits' dtype or None).

    The losses are differentiable in the logits when no gradient is asked for.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scores = torch.log_softmax(wide, dim=-1)
    losses = -scores.gather(1, targets.unsqueeze(1)).squeeze(1)
    if not gradient:
        return losses, None
    slope = scores.exp_()
    slope.scatter_add_(1, targets.unsqueeze(1), slope.new_full((len(targets), 1), -1.0))
    return losses, slope.to(logits.dtype)


def _takes(logits: Tensor, targets: Tensor, gradient: bool = False) -> bool:
    return gradient and _gpu.fits(logits) and targets.dtype == torch.int64 and targets.is_contiguous()


@cross_entropy.backend("cuda", _takes)
def _cuda(logits: Tensor, targets: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor | None]:  # noqa: ARG001
    losses, slope = _gpu.cross_entropy(logits, targets)
    return losses, slope


def _in_core(logits: Tensor, targets: Tensor, gradient: bool = False) -> bool:
    plain = gradient or not (torch.is_grad_enabled() and logits.requires_grad)
    return plain and _training.takes(logits) and targets.dtype == torch.int64


@cross_entropy.backend("cpu", _in_core)
def _cpu(logits: Tensor, targets: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor | None]:
    """A row after the other, while it is in the processor's cache; no copy of all in float32."""
    losses = torch.empty(len(targets), dtype=torch.float32)
    slope = torch.empty_like(logits, memory_format=torch.contiguous_format) if gradient else None
    torch.ops.ftkit.cross_entropy(logits.detach().contiguous(), targets.contiguous(), losses, slope)
    return losses, slope
