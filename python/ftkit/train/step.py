"""One optimizer step's gradients: several forward passes that count as one big batch.

An objective gives a sum and a count for every batch. The sums' gradients are added over the step's batches and divided
once by the step's whole count, so that how the tokens fall into batches changes nothing but rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import LossParts
from ftkit.optim import clip

Loss = Callable[[RaggedBatch], LossParts]
Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step's batches gave."""

    loss: float
    """Mean over what is trained on; NaN when nothing is."""
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """Real tokens that went through the model."""
    trained: float
    """What the mean is over: trained tokens, by weight."""


def gradients(
    loss: Loss,
    parameters: Parameters,
    batches: Sequence[RaggedBatch],
    max_norm: float,
    before: Callable[[], None] = lambda: None,
) -> StepOutcome:
    """Leaves the mean loss' gradient, clipped to `max_norm` (0: as it is), in the parameters' `.grad`.

    `before` is called before each batch.
    """
    total, count = 0.0, 0.0
    for batch in batches:
        before()
        parts = loss(batch)
        trained = float(parts.count.sum())
        if trained == 0:
            continue
        parts.sum.sum().backward()
        total += float(parts.sum.detach().double().sum())
        count += trained
    existing = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    if existing and count:
        torch._foreach_div_(existing, count)
    return StepOutcome(
        loss=total / count if count else float("nan"),
        gradient_norm=clip(parameters, max_norm),
        tokens=sum(batch.tokens.numel() for batch in batches),
        trained=count,
    )


@torch.no_grad()
def mean_loss(loss: Loss, batches: Sequence[RaggedBatch]) -> float:
    """The mean loss over batches; NaN when nothing in them counts."""
    total, count = 0.0, 0.0
    for batch in batches:
        parts = loss(batch)
        total += float(parts.sum.double().sum())
        count += float(parts.count.sum())
    return total / count if count else float("nan")


def clear(parameters: Parameters) -> None:
    """Forgets the gradients."""
    for parameter in parameters.values():
        parameter.grad = None
