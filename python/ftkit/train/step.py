"""One optimizer step's gradients: several forward passes that count as one big batch.

An objective gives a sum and a count for every batch. The sums' gradients are added over the step's batches and divided
once by the step's whole count, so that how the tokens fall into batches changes nothing but rounding.

A step of one batch knows its count before its gradients. So each weight can be updated, and its gradient freed, while
the backward pass goes on to the next: `step_in_backward`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import LossParts
from ftkit.optim import Optimizer, clip

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


def step_in_backward(
    loss: Loss, parameters: Parameters, batch: RaggedBatch, optimizer: Optimizer, factor: float
) -> StepOutcome:
    """The whole step of one batch, each parameter's update as soon as its gradient is there: the same bits.

    Without trained tokens or a finite loss nothing is updated. A gradient that isn't finite is seen when those before
    it have been used: its parameter stays as it is, and the norm tells.
    """
    parts = loss(batch)
    count, total = float(parts.count.sum()), float(parts.sum.detach().double().sum())
    mean = total / count if count else float("nan")
    summed = parts.sum.sum()
    del parts
    norms = []

    def update(name: str, gradient: torch.Tensor) -> None:
        gradient.div_(count)
        norms.append(
            float(torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)))
        )
        if math.isfinite(norms[-1]):
            optimizer.update(name, factor)

    if math.isfinite(mean):
        optimizer.begin()
        with each_gradient(parameters, update):
            summed.backward()
    return StepOutcome(loss=mean, gradient_norm=math.hypot(*norms), tokens=batch.tokens.numel(), trained=count)


@contextmanager
def each_gradient(parameters: Parameters, use: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """In a backward pass inside, calls `use` with each parameter's name and whole gradient, and forgets it after."""

    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def used(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            use(name, parameter.grad)
            parameter.grad = None

        return used

    handles = [parameter.register_post_accumulate_grad_hook(hook(name)) for name, parameter in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
