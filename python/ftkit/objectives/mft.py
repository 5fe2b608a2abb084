"""Multitask finetuning: several tasks at once, none of which drowns in the data of another.

    loss = Σ_k s_k · mean_k / Σ_k s_k          over tasks k in a step, mean_k of −log p over k's trained tokens

Every row names its task in a column `task`, beside the columns of any layout with one answer. `balance` decides the
shares s: `tasks` gives each task its `weights` (1 where none is given), whatever there is of its data; `none` counts
tokens, which is `sft`; `coba` follows how fast each task converges, on held-out rows of which a batch is looked at in
every step. A task that converges slowly gets more, one that has begun to get worse gets less (see `_coba.py`); for that
it needs `evaluation.split` or a file, and a forward pass more in a step. `by = "rows"` takes the mean over rows of each
row's own mean, so that long answers weigh no more than short ones.

Choose `tasks` where the data is of unequal size, `coba` where some tasks overfit while others still learn.

Source: Liu et al., MFTCoder: Boosting Code LLMs with Multitask Fine-Tuning, 2023, arXiv 2311.02303; Gong et al., CoBa:
Convergence Balancer for Multitask Finetuning of Large Language Models, 2024, arXiv 2410.06741.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ftkit.config import option
from ftkit.errors import InputError, did_you_mean
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts, _coba
from ftkit.objectives._tasks import Add, loss_by_task, weighed

PAIRS = False
TASKS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Multitask finetuning's settings."""

    balance: Literal["tasks", "coba", "none"] = option(
        "tasks", "tasks: each task counts as much; coba: as its convergence asks for; none: each token or row does"
    )
    by: Literal["tokens", "rows"] = option("tokens", "what a task's mean is over")
    weights: dict[str, float] = field(
        default_factory=dict, metadata={"meaning": "factors on the shares of tasks, by name; 1 for others"}
    )
    warmup: int = option(100, "coba: steps with equal shares, to see how tasks converge", at_least=2)
    history: int = option(200, "coba: steps over which a slope is fitted; 2 to 5 times the warmup", at_least=2)
    tau: float = option(5.0, "coba: how soon divergence is believed", above=0)

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise InputError(f"weights: expected numbers, at least 0, got {weight} for {name!r}")

    @property
    def watches(self) -> bool:
        """Whether losses on held-out rows decide."""
        return self.balance == "coba"


def loss(forward: Forward, batch: RaggedBatch, config: Config, names: Sequence[str] = ()) -> LossParts:  # noqa: ARG001
    """The weighted losses and their weights, by task."""
    return loss_by_task(forward, batch, names)


def balanced(
    batches: Sequence[RaggedBatch],
    config: Config,
    names: Sequence[str],
    losses: Sequence[Sequence[float]] = (),
    add: Add = lambda sums: sums,
) -> list[RaggedBatch]:
    """A step's batches with the weights of their tokens; `losses`: those on held-out rows, step by step, by task.

    Raises InputError for the weight of a task that is not there.
    """
    for name in config.weights:
        if name not in names:
            raise InputError(
                f"objective.weights: expected tasks of the data ({', '.join(names)}), got {name!r}",
                did_you_mean(name, names),
            )
    factors = torch.tensor([config.weights.get(name, 1.0) for name in names], dtype=torch.float64)
    if config.watches:
        factors = factors * _coba.shares(losses, len(names), config.warmup, config.history, config.tau)

    def shares(sums: Tensor) -> Tensor:
        return factors * sums if config.balance == "none" else factors

    return weighed(batches, len(names), shares, by_rows=config.by == "rows", add=add)
