"""Optimizers: one file each; their schedules are in `schedules`.

A plugin has a settings class `Config` with at least `learning_rate`, and `rule(config) -> Rule`, which says how one
parameter moves. What all of them share is in `Optimizer`: state in float32 whatever the parameters are in, named after
them so that a checkpoint is a plain file of named tensors, and a float32 copy of weights in low precision. Parameters
that are shared out over processes have their state shared out as well, and the same checkpoint.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ftkit import config, plugins
from ftkit.nn.shards import is_shared_out, local
from ftkit.optim._optimizer import Moment, Optimizer, Place, Rule
from ftkit.optim._shared_out import SharedOut

__all__ = ["Moment", "Optimizer", "Place", "Rule", "SharedOut", "build", "clip"]


def build(
    choice: config.Choice, parameters: Mapping[str, torch.nn.Parameter], place: Place | None = None
) -> Optimizer | SharedOut:
    """The optimizer that a configuration names, over named parameters; `place`: of its state, if not in memory."""
    plugin: Any = plugins.load("optim", choice.name)
    settings = plugin.Config(**choice.options)
    if any(is_shared_out(parameter) for parameter in parameters.values()):
        return SharedOut(parameters, plugin.rule(settings), settings.learning_rate)
    return Optimizer(parameters, plugin.rule(settings), settings.learning_rate, place)


def clip(
    parameters: Mapping[str, torch.nn.Parameter], max_norm: float, add: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Scales all gradients down to a common norm of `max_norm` (0: leaves them); the norm before.

    `add`: a sum over the processes that share the gradients out, where some do.
    """
    gradients = [local(parameter.grad) for parameter in parameters.values() if parameter.grad is not None]
    if not gradients:
        return 0.0
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients])
    norm = float(torch.linalg.vector_norm(norms) if add is None else add(norms.double().square().sum()).sqrt())
    if 0 < max_norm < norm < float("inf"):
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm
