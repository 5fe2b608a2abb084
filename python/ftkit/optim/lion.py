"""Lion: every weight moves by the learning rate, in the direction that mean and gradient agree on. Half AdamW's state.

    w ← w − η λ w                  w ← w − η · sign(β₁ m + (1 − β₁) g)          m ← β₂ m + (1 − β₂) g

State: 4 bytes a parameter. A sign is larger than AdamW's usual update: the paper takes a rate 3 to 10 times smaller,
and a weight decay as many times larger. Matrices decay; vectors and embeddings do not.

Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, arXiv 2302.06675.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftkit.config import option
from ftkit.optim._optimizer import Moment, chunks, zeros


@dataclass(frozen=True, kw_only=True)
class Config:
    """Lion's settings."""

    learning_rate: float = option(5e-5, "the highest rate; 5e-5 suits LoRA, 2e-6 full finetuning", above=0)
    beta1: float = option(0.9, "the mean's share in the direction", at_least=0, below=1)
    beta2: float = option(0.99, "memory of the gradient's mean", at_least=0, below=1)
    weight_decay: float = option(0.0, "share of a matrix, times the rate, lost a step; 0 suits short runs", at_least=0)


def rule(config: Config) -> "Lion":
    """Lion's rule."""
    return Lion(config.beta1, config.beta2, config.weight_decay)


class Lion:
    """The gradient's mean."""

    def __init__(self, beta1: float, beta2: float, weight_decay: float) -> None:
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay

    def state(self, name: str, weight: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """`mean`, of the weight's shape."""
        return {"mean": zeros(weight)}

    def elementwise(self, name: str, weight: Tensor) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], moment: Moment) -> None:
        """See the file's equations."""
        kept = 1 - moment.rate * self.weight_decay if moment.decays else 1.0
        for part, values, mean in chunks(gradient, weight, state["mean"]):
            direction = torch.lerp(mean, part, 1 - self.beta1).sign_()
            values.mul_(kept).add_(direction, alpha=-moment.rate)
            mean.lerp_(part, 1 - self.beta2)
