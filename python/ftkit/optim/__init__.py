"""Optimizers: one file each; their schedules are in `schedules`.

A plugin has a settings class `Config` with at least `learning_rate`, and `rule(config) -> Rule`, which says how one
parameter moves. What all of them share is in `Optimizer`: state in float32 whatever the parameters are in, named after
them so that a checkpoint is a plain file of named tensors, and a float32 copy of weights in low precision.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ftkit import config, plugins
from ftkit.optim._optimizer import Moment, Optimizer, Place, Rule

__all__ = ["Moment", "Optimizer", "Place", "Rule", "build", "clip"]


def build(choice: config.Choice, parameters: Mapping[str, torch.nn.Parameter], place: Place | None = None) -> Optimizer:
    """The optimizer that a configuration names, over named parameters; `place`: of its state, if not in memory."""
    plugin: Any = plugins.load("optim", choice.name)
    settings = plugin.Config(**choice.options)
    return Optimizer(parameters, plugin.rule(settings), settings.learning_rate, place)


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
