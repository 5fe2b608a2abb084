"""AdamW: Adam with decoupled weight decay, its state and a copy of low-precision weights in float32.

    m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
    w ← w − η λ w                  w ← w − η · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)

Weights in bfloat16 keep 8 bits of mantissa: an update below 1/256 of a weight would round away. They get a float32
copy that takes the updates and is rounded into them after each step. Matrices decay; vectors (norms, biases) and
embeddings do not, since pulling those to zero shrinks activations rather than complexity.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv 1711.05101.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ftkit.config import option


@dataclass(frozen=True, kw_only=True)
class Config:
    """AdamW's settings."""

    learning_rate: float = option(2e-4, "the highest rate; 2e-4 suits LoRA, 1e-5 full finetuning", above=0)
    beta1: float = option(0.9, "memory of the gradient's mean", at_least=0, below=1)
    beta2: float = option(0.999, "memory of the gradient's square", at_least=0, below=1)
    epsilon: float = option(1e-8, "added to the denominator", above=0)
    weight_decay: float = option(0.0, "share of a matrix, times the rate, lost a step; 0 suits short runs", at_least=0)


def build(parameters: Mapping[str, torch.nn.Parameter], config: Config) -> "AdamW":
    """AdamW over named parameters."""
    return AdamW(parameters, config)


class AdamW:
    """The state (mean, square, and a float32 copy where one is needed) and the step."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: Config) -> None:
        self.learning_rate = config.learning_rate
        self._config = config
        self._parameters = dict(parameters)
        self._steps = 0
        self._mean = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self._square = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self._copy = {name: p.detach().to(torch.float32) for name, p in parameters.items() if p.dtype != torch.float32}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update from the gradients; a parameter without one stays as it is."""
        self._steps += 1
        names = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        if not names:
            return
        settings, rate = self._config, self.learning_rate * factor
        weights = [self._copy.get(name, self._parameters[name].data) for name in names]
        gradients = [self._gradient(name) for name in names]
        mean, square = [self._mean[name] for name in names], [self._square[name] for name in names]
        decaying = [w for name, w in zip(names, weights, strict=True) if decays(name, w)]
        if settings.weight_decay and decaying:
            torch._foreach_mul_(decaying, 1 - rate * settings.weight_decay)
        torch._foreach_lerp_(mean, gradients, 1 - settings.beta1)
        torch._foreach_mul_(square, settings.beta2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - settings.beta2)
        denominators = torch._foreach_sqrt(square)
        torch._foreach_div_(denominators, (1 - settings.beta2**self._steps) ** 0.5)
        torch._foreach_add_(denominators, settings.epsilon)
        torch._foreach_addcdiv_(weights, mean, denominators, -rate / (1 - settings.beta1**self._steps))
        for name, copy in self._copy.items():
            self._parameters[name].data.copy_(copy)

    def state(self) -> dict[str, torch.Tensor]:
        """`steps`, and `mean/NAME`, `square/NAME` and `copy/NAME`, float32."""
        state = {"steps": torch.tensor(self._steps, dtype=torch.int64)}
        for kind, tensors in (("mean", self._mean), ("square", self._square), ("copy", self._copy)):
            state |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        return state

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` gave."""
        self._steps = int(state["steps"])
        for kind, tensors in (("mean", self._mean), ("square", self._square), ("copy", self._copy)):
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{kind}/{name}"])

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None
        return gradient.to(torch.float32)


def decays(name: str, weight: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices, except embeddings."""
    return weight.ndim >= 2 and "embed_tokens" not in name
