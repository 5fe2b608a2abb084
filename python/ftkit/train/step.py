"""One optimizer step's gradients: several forward passes that count as one big batch.

An objective gives a sum and a count for every batch. The sums' gradients are added over the step's batches and divided
once by the step's whole count, so that how the tokens fall into batches, and batches to processes, changes nothing but
rounding.

A step of one batch knows its count before its gradients. So each weight can be updated, and its gradient freed, while
the backward pass goes on to the next: `step_in_backward`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ftkit.nn.batch import RaggedBatch
from ftkit.nn.shards import local
from ftkit.objectives import LossParts
from ftkit.optim import Optimizer, SharedOut, clip
from ftkit.train.processes import ALONE, Processes

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
    """What the mean is over: trained tokens, by weight, or pairs."""
    trained_tokens: int
    """Targets that were trained on."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Means of what the objective reports beside its loss."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """What batches gave that nothing is learnt from."""

    loss: float
    """NaN when nothing in them counts."""
    metrics: Mapping[str, float]


class _Totals:
    """Sums over batches, on the host."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0.0
        self.tokens = 0
        self.trained_tokens = 0
        self._metrics: dict[str, tuple[float, float]] = {}

    def saw(self, batch: RaggedBatch) -> None:
        """Counts a batch's tokens."""
        self.tokens += batch.tokens.numel()
        self.trained_tokens += batch.trained.numel()

    def of_all(self, processes: Processes) -> "_Totals":
        """The sums over all processes, in the order of their ranks."""
        whole = _Totals()
        for one in processes.exchange(self):
            whole.sum += one.sum
            whole.count += one.count
            whole.tokens += one.tokens
            whole.trained_tokens += one.trained_tokens
            for name, (told, of) in one._metrics.items():
                before = whole._metrics.get(name, (0.0, 0.0))
                whole._metrics[name] = (before[0] + told, before[1] + of)
        return whole

    def add(self, parts: LossParts) -> None:
        self.sum += float(parts.sum.detach().double().sum())
        self.count += float(parts.count.sum())
        for name, value in parts.metrics.items():
            told, of = value.tolist() if value.numel() > 1 else (float(value), float(parts.count.sum()))
            before = self._metrics.get(name, (0.0, 0.0))
            self._metrics[name] = (before[0] + told, before[1] + of)

    @property
    def means(self) -> Means:
        if not self.count:
            return Means(loss=float("nan"), metrics={})
        means = {name: total / count for name, (total, count) in self._metrics.items() if count}
        return Means(loss=self.sum / self.count, metrics=means)


def gradients(
    loss: Loss,
    parameters: Parameters,
    batches: Sequence[RaggedBatch],
    max_norm: float,
    before: Callable[[RaggedBatch], None] = lambda _: None,
    processes: Processes = ALONE,
    spare: RaggedBatch | None = None,
) -> StepOutcome:
    """Leaves the mean loss' gradient, clipped to `max_norm` (0: as it is), in the parameters' `.grad`.

    `before` is called before each batch. The mean is over the batches of all processes; those that share out weights
    and have fewer than others go through the model with `spare`, for nothing.
    """
    totals = _Totals()
    for batch, counts in _passes(batches, processes, spare):
        before(batch)
        if counts:
            totals.saw(batch)
        parts = loss(batch)
        trains = float(parts.count.sum()) != 0
        if trains or processes.sharded:
            (parts.sum.sum() if counts else 0 * parts.sum.sum()).backward()
        if trains and counts:
            totals.add(parts)
    totals = totals.of_all(processes)
    if totals.count:
        processes.add_gradients(parameters.values())
    existing = [local(parameter.grad) for parameter in parameters.values() if parameter.grad is not None]
    if existing and totals.count:
        torch._foreach_div_(existing, totals.count)
    return StepOutcome(
        loss=totals.means.loss,
        gradient_norm=clip(parameters, max_norm, processes.add if processes.sharded else None),
        tokens=totals.tokens,
        trained=totals.count,
        trained_tokens=totals.trained_tokens,
        metrics=totals.means.metrics,
    )


def step_in_backward(
    loss: Loss,
    parameters: Parameters,
    batch: RaggedBatch,
    optimizer: Optimizer | SharedOut,
    factor: float,
    processes: Processes = ALONE,
    *,
    counts: bool = True,
) -> StepOutcome:
    """The whole step of one batch, each parameter's update as soon as its gradient is there: the same bits.

    Without trained tokens or a finite loss nothing is updated. A gradient that isn't finite is seen when those before
    it have been used: its parameter stays as it is, and the norm tells. Of processes that share out weights each has a
    batch; one that doesn't count goes through the model for nothing.
    """
    totals, parts = _Totals(), loss(batch)
    if counts:
        totals.saw(batch)
        totals.add(parts)
    totals = totals.of_all(processes)
    count, means = totals.count, totals.means
    summed = parts.sum.sum() if counts else 0 * parts.sum.sum()
    del parts
    norms = []

    def update(name: str, gradient: torch.Tensor) -> None:
        gradient = local(gradient).div_(count)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        if processes.sharded:
            norm = processes.add(norm.double().square()).sqrt()
        norms.append(float(norm))
        if math.isfinite(norms[-1]):
            optimizer.update(name, factor)

    if math.isfinite(means.loss):
        optimizer.begin()
        with each_gradient(parameters, update):
            summed.backward()
    return StepOutcome(
        loss=means.loss,
        gradient_norm=math.hypot(*norms),
        tokens=totals.tokens,
        trained=count,
        trained_tokens=totals.trained_tokens,
        metrics=means.metrics,
    )


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


def _passes(
    batches: Sequence[RaggedBatch], processes: Processes, spare: RaggedBatch | None
) -> Iterator[tuple[RaggedBatch, bool]]:
    """The batches that this process goes through the model with, and whether they count."""
    rounds = processes.rounds(len(batches))
    for batch in batches:
        yield batch, True
    for _ in range(rounds - len(batches)):
        assert spare is not None
        yield spare, False


@torch.no_grad()
def means(
    loss: Loss, batches: Sequence[RaggedBatch], processes: Processes = ALONE, spare: RaggedBatch | None = None
) -> Means:
    """The mean loss over the batches of all processes, and the means of what the objective reports beside it."""
    totals = _Totals()
    for batch, counts in _passes(batches, processes, spare):
        parts = loss(batch)
        if counts:
            totals.add(parts)
    return totals.of_all(processes).means


def clear(parameters: Parameters) -> None:
    """Forgets the gradients."""
    for parameter in parameters.values():
        parameter.grad = None
