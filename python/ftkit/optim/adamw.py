"""AdamW: Adam with decoupled weight decay, its state and a copy of low-precision weights in float32.

    m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
    w ← w − η λ w                  w ← w − η · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

State: 8 bytes a parameter. Matrices decay; vectors and embeddings do not.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv 1711.05101.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftkit.config import option
from ftkit.optim._optimizer import Moment, chunks, zeros


@dataclass(frozen=True, kw_only=True)
class Config:
    """AdamW's settings."""

    learning_rate: float = option(2e-4, "the highest rate; 2e-4 suits LoRA, 1e-5 full finetuning", above=0)
    beta1: float = option(0.9, "memory of the gradient's mean", at_least=0, below=1)
    beta2: float = option(0.999, "memory of the gradient's square", at_least=0, below=1)
    epsilon: float = option(1e-8, "added to the denominator", above=0)
    weight_decay: float = option(0.0, "share of a matrix, times the rate, lost a step; 0 suits short runs", at_least=0)


def rule(config: Config) -> "AdamW":
    """AdamW's rule."""
    return AdamW(config.beta1, config.beta2, config.epsilon, config.weight_decay)


class AdamW:
    """Mean and square of the gradient, and torch's fused update, which allocates nothing."""

    def __init__(self, beta1: float, beta2: float, epsilon: float, weight_decay: float) -> None:
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay

    def state(self, name: str, weight: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """`mean` and `square`, of the weight's shape."""
        return {"mean": zeros(weight), "square": zeros(weight)}

    def elementwise(self, name: str, weight: Tensor) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], moment: Moment) -> None:
        """See the file's equations."""
        step = torch.tensor(float(moment.step), device=weight.device)
        for part, values, mean, square in chunks(gradient, weight, state["mean"], state["square"]):
            torch._fused_adamw_(
                [values],
                [part],
                [mean],
                [square],
                [],
                [step],
                lr=moment.rate,
                beta1=self.beta1,
                beta2=self.beta2,
                weight_decay=self.weight_decay if moment.decays else 0.0,
                eps=self.epsilon,
                amsgrad=False,
                maximize=False,
            )
