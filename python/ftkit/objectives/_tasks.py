"""What losses of several tasks share: each task is a mean of its own, and has a share of the whole.

    loss = Σ_k s_k · (Σ_t∈k b_t l_t / Σ_t∈k b_t) / Σ_k s_k          over tasks k that a step has, l = −log p

A mean over a step's tokens of a task is no sum over its batches, but it becomes one when each token's weight is known
beforehand: w_t = s_k b_t / (Σ_k b · Σ s). All that it needs is in the data, so a step's batches get their weights
before the first of them is computed. Then the loss is a weighted sum as any other, and accumulation, packing and
several processes leave it alone. The weights of a step add up to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts, losses_of_trained, sums_by_task

Add = Callable[[Tensor], Tensor]
"""Sums f64 [K] over all processes."""


def weighed(
    batches: Sequence[RaggedBatch],
    tasks: int,
    shares: Callable[[Tensor], Tensor],
    *,
    by_rows: bool = False,
    add: Add = lambda sums: sums,
) -> list[RaggedBatch]:
    """A step's batches with the weights of their tokens.

    `shares` makes of the tasks' Σ b (f64 [tasks], 0 for one that the step does not have) their shares. `by_rows`: b is
    1 over the trained tokens of its sequence, so that a task's mean is one over rows, else 1.
    """
    parts = [_parts(batch, by_rows) for batch in batches]
    zeros = torch.zeros(tasks, dtype=torch.float64)
    sums = add(sum((zeros.index_add(0, task, weight) for task, weight in parts), zeros))
    wanted = torch.where(sums > 0, shares(sums), zeros)
    factors = torch.where(sums > 0, wanted / sums.clamp(min=1e-300), zeros) / wanted.sum().clamp(min=1e-300)
    found = []
    for batch, (task, weight) in zip(batches, parts, strict=True):
        spread = torch.zeros(batch.tokens.numel(), dtype=torch.float32)
        spread[batch.trained.cpu()] = (weight * factors[task]).float()
        found.append(replace(batch, weights=spread.to(batch.tokens.device)))
    return found


def _parts(batch: RaggedBatch, by_rows: bool) -> tuple[Tensor, Tensor]:
    """The task i64 [K] and b f64 [K] of each trained token, on the host."""
    sequence = batch.sequence.cpu()[batch.trained.cpu()]
    numbers = torch.zeros(len(batch.lengths), dtype=torch.int64) if batch.task is None else batch.task.cpu().long()
    weight = torch.ones(len(sequence), dtype=torch.float64)
    if by_rows:
        weight /= torch.bincount(sequence, minlength=len(batch.lengths))[sequence]
    return numbers[sequence], weight


def loss_by_task(forward: Forward, batch: RaggedBatch, names: Sequence[str]) -> LossParts:
    """The weighted losses by task; `loss_NAME` and `weight_NAME` tell of each."""
    parts = sums_by_task(losses_of_trained(forward, batch), batch, max(1, len(names)))
    told = {}
    sums, counts = parts.sum.detach(), parts.count
    for number, name in enumerate(names):
        told[f"loss_{name}"] = torch.stack([sums[number], counts[number].to(sums.dtype)])
    for number, name in enumerate(names):
        told[f"weight_{name}"] = counts[number]
    return LossParts(sum=parts.sum, count=parts.count, metrics=told)
