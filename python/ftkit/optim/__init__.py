"""Optimizers: one file each; their schedules are in `schedules`.

A plugin has a settings class `Config` with at least `learning_rate`, and
`build(parameters, config) -> Optimizer`, where `parameters` maps names to the tensors that are trained. Optimizers
read `.grad`, keep their state in float32 whatever the parameters are in, and name it after the parameters, so that
a checkpoint is a plain file of named tensors.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ftkit import config, plugins


class Optimizer(Protocol):
    """What the training loop asks of an optimizer."""

    learning_rate: float
    """The rate that a schedule's factor of 1 stands for."""

    def step(self, factor: float) -> None:
        """One update from the parameters' gradients, at `factor` times the learning rate."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """The state by name: all that an uninterrupted run would have, down to the bit."""
        ...

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` gave. Raises KeyError when a name is missing."""
        ...


def build(choice: config.Choice, parameters: Mapping[str, torch.nn.Parameter]) -> Optimizer:
    """The optimizer that a configuration names, over named parameters."""
    plugin: Any = plugins.load("optim", choice.name)
    optimizer: Optimizer = plugin.build(parameters, plugin.Config(**choice.options))
    return optimizer


def clip(parameters: Mapping[str, torch.nn.Parameter], max_norm: float) -> float:
    """Scales all gradients down to a common norm of `max_norm` (0: leaves them); the norm before."""
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    if not gradients:
        return 0.0
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients])
    norm = float(torch.linalg.vector_norm(norms))
    if 0 < max_norm < norm < float("inf"):
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm
