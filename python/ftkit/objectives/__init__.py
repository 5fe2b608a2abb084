"""What is minimised: one file an objective.

An objective's file has `loss(forward, batch) -> LossParts`, `PAIRS` (whether its rows are pairs of a chosen and a
rejected answer) and, where it has options, `Config`. `LABELLED = True` takes rows of one answer and its label, too;
`TOGETHER` answers of neighbouring rows then have one number in `batch.group`, whatever row of a batch they are in.

An objective of several tasks has `TASKS = True` (every row names its task) or `EXPLAINED = True` (rows are a label and
a rationale), its `loss` takes the tasks' `names`, and `balanced(batches, config, names, losses)` gives the batches of a
step the weights that a mean over each task needs. Where `config.watches`, `losses` are those of the tasks on held-out
rows, in every step so far.

A loss is returned as sums and counts, one entry a task, so that whoever adds up micro-batches, packed rows, tasks and
machines divides once, by what was really trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import DecoderConfig
from ftkit.nn.loss import token_losses
from ftkit.nn.routes import Routes

__all__ = ["Forward", "LossParts", "losses_of_trained", "sums_by_task", "trained_rows"]


class Forward(Protocol):
    """What an objective needs of a model."""

    config: DecoderConfig

    @property
    def lm_head(self) -> nn.Module:
        """The layer whose parameters decide whether the head is trained."""

    def __call__(self, batch: RaggedBatch) -> Tensor:
        """The hidden states [T, d]."""

    def head(self, hidden: Tensor, routes: Routes | None = None) -> Tensor:
        """Hidden states [rows, d] to logits [rows, vocab_size]."""


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """A loss before it is divided."""

    sum: Tensor
    """f32 [tasks], differentiable."""
    count: Tensor
    """f32 [tasks]: what to divide by; the weights of the trained tokens, summed, or the number of pairs."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Further sums to report in the events of a run, each divided by `count`'s total, or [2]: a sum and its own count;
    the first two are shown live."""


def losses_of_trained(forward: Forward, batch: RaggedBatch) -> Tensor:
    """The loss (−log probability) of each trained token of the batch, [K] in the order of `batch.trained`.

    The head works on trained positions only.
    """
    if batch.targets is None:
        raise ValueError("expected a batch with targets, got one without")
    hidden, options = trained_rows(forward, batch)
    targets = batch.targets.index_select(0, batch.trained).long()
    return token_losses(forward.head, hidden, targets, forward.config.vocab_size, **options)


def trained_rows(forward: Forward, batch: RaggedBatch) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states [K, d] of the batch's trained positions, and what `nn.loss` wants to know of the head."""
    rows = batch.trained
    hidden = forward(batch).index_select(0, rows)
    routes = None
    if getattr(forward.lm_head, "adapters", None):
        single = batch.routes.single
        routes = Routes(((single, 0, len(rows)),)) if single is not None else batch.routes.take(rows.tolist())
    trained = any(parameter.requires_grad for parameter in forward.lm_head.parameters())
    return hidden, {"routes": routes, "head_is_trained": trained}


def sums_by_task(losses: Tensor, batch: RaggedBatch, tasks: int | None = None) -> LossParts:
    """The weighted losses [K] of the trained tokens and their weights, added up by task.

    `tasks`: how many there are, else those up to the last that the batch has.
    """
    rows = batch.trained
    weights = torch.ones_like(losses) if batch.weights is None else batch.weights.index_select(0, rows).to(losses.dtype)
    weighted = losses * weights
    if batch.task is None:
        return LossParts(sum=weighted.sum().unsqueeze(0), count=weights.sum().unsqueeze(0))
    task = batch.task.long()[batch.sequence[rows]]  # [K]
    zeros = losses.new_zeros(int(batch.task.max()) + 1 if tasks is None else tasks)
    return LossParts(sum=zeros.index_add(0, task, weighted), count=zeros.index_add(0, task, weights.detach()))
