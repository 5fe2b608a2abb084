"""Muon: matrices move along their momentum's nearest orthogonal matrix, so that all its directions count the same.

    m ← μ m + (1 − μ) g            u ← (1 − μ) g + μ m
    X₀ = u / ‖u‖                   Xₖ₊₁ = a X + b (X Xᵀ) X + c (X Xᵀ)² X,  five times
    w ← w − η λ w                  w ← w − η · 0.2 √max(rows, columns) · X₅

(a, b, c) = (3.4445, −4.7750, 2.0315) bring singular values near 1, between 0.7 and 1.2, rather than to 1 exactly. The
factor 0.2 √max gives an update the RMS that AdamW's usually has, so that one rate and one weight decay suit both:
embeddings, the head and vectors, whose rows or entries are no directions of a map, follow AdamW.

State: 4 bytes a parameter, 8 where AdamW is at work. Five products of matrices a step make it the slowest one here.

Sources: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
kellerjordan.github.io/posts/muon; the factor: Liu et al., Muon is Scalable for LLM Training, 2025, arXiv 2502.16982.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftkit.config import option
from ftkit.optim._optimizer import Moment, zeros
from ftkit.optim.adamw import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LEAST_NORM = 1e-7
"""What a momentum of nearly nothing is divided by, so that it stays nearly nothing."""
RMS = 0.2
"""An AdamW update's, by the rate."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Muon's settings, and those of AdamW for what is no hidden matrix."""

    learning_rate: float = option(2e-4, "the highest rate; 2e-4 suits LoRA, 1e-5 full finetuning", above=0)
    momentum: float = option(0.95, "memory of the gradient", at_least=0, below=1)
    beta1: float = option(0.9, "AdamW's memory of the gradient's mean", at_least=0, below=1)
    beta2: float = option(0.999, "AdamW's memory of the gradient's square", at_least=0, below=1)
    epsilon: float = option(1e-8, "added to AdamW's denominator", above=0)
    weight_decay: float = option(0.0, "share of a matrix, times the rate, lost a step; 0 suits short runs", at_least=0)


def rule(config: Config) -> "Muon":
    """Muon's rule."""
    return Muon(config)


class Muon:
    """`momentum` of hidden matrices, AdamW's state of everything else."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._rest = AdamW(config.beta1, config.beta2, config.epsilon, config.weight_decay)

    def state(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """`momentum`, of the matrix' shape; or AdamW's."""
        return self._rest.state(name, weight) if self.elementwise(name, weight) else {"momentum": zeros(weight)}

    def elementwise(self, name: str, weight: Tensor) -> bool:
        """Where AdamW is at work: on what is no hidden matrix."""
        return weight.ndim != 2 or "embed_tokens" in name or "lm_head" in name

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], moment: Moment) -> None:
        """See the file's equations."""
        if "momentum" not in state:
            self._rest.update(weight, gradient, state, moment)
            return
        gradient, share = gradient.float(), self._config.momentum
        momentum = state["momentum"].lerp_(gradient, 1 - share)
        direction = orthogonal(gradient.lerp(momentum, share))
        if moment.decays:
            weight.mul_(1 - moment.rate * self._config.weight_decay)
        weight.add_(direction, alpha=-moment.rate * RMS * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix, float32 [rows, columns], with singular values near 1; zero stays zero.

    bfloat16 on a GPU, where it is many times faster and what the iteration was made for.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / torch.linalg.vector_norm(matrix).clamp_(min=LEAST_NORM)
    if x.device.type == "cuda":
        x = x.bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.T  # [smaller side, smaller side]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    found: Tensor = x.T if tall else x
    return found.float()
