"""How far a distribution over the vocabulary is from a teacher's, by the logits of both, and its gradient.

    p = softmax(t / τ) the teacher's, q = softmax(z / τ) the student's, m = β p + (1 − β) q

    forward_kl    Σ p log(p / q)                                    ∂/∂z = (q − p) / τ
    reverse_kl    Σ q log(q / p)                                    ∂/∂z = q (log(q / p) − the loss) / τ
    jsd           β Σ p log(p / m) + (1 − β) Σ q log(q / m)         ∂/∂z = (1 − β) q (g − Σ q g) / τ,  g = log(q / m)

Computed in float32 (float64 for float64).

Source: Agarwal et al., On-Policy Distillation of Language Models, 2023, arXiv 2306.13649.
"""

import math

import torch
from torch import Tensor

from ftkit.kernels import operation

KINDS = ("forward_kl", "reverse_kl", "jsd")


@operation
def divergence(
    logits: Tensor,
    teacher: Tensor,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """logits and the teacher's [rows, V] to (losses [rows], the gradient [rows, V] in the logits' dtype or None).

    `beta`, between 0 and 1, is the mixture's of `jsd`. The losses are differentiable in the logits when no gradient is
    asked for.
    """
    q, p = (_log_softmax(values, temperature) for values in (logits, teacher))
    if kind == "forward_kl":
        losses = (p.exp() * (p - q)).sum(-1)
        slope = (q.exp_() - p.exp_()) if gradient else None
    elif kind == "reverse_kl":
        ratio = q - p
        losses = (q.exp() * ratio).sum(-1)
        slope = q.exp_() * (ratio - losses.unsqueeze(1)) if gradient else None
    else:
        mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        ratio = q - mixture
        weighted = q.exp() * ratio
        own = weighted.sum(-1)
        losses = beta * (p.exp() * (p - mixture)).sum(-1) + (1 - beta) * own
        slope = weighted.sub_(q.exp_().mul_(own.unsqueeze(1))).mul_(1 - beta) if gradient else None
    return losses, None if slope is None else slope.div_(temperature).to(logits.dtype)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide if temperature == 1 else wide / temperature, dim=-1)
