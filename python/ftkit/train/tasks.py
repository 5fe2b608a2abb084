"""Several tasks in one run: a step's batches get the weights that balance them, by what held-out rows say where asked.

Which held-out batch a step looks at is decided by its number, and what was seen stands in the checkpoint, so a resumed
run goes on with the same weights.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.train.checkpoint import Progress
from ftkit.train.processes import ALONE, Processes
from ftkit.train.step import Loss
from ftkit.train.watchdog import Warning


class Tasks:
    """An objective's balance between tasks."""

    def __init__(
        self,
        config: RunConfig,
        objective: ModuleType,
        names: Sequence[str],
        held_out: Sequence[RaggedBatch] | None,
        processes: Processes = ALONE,
    ) -> None:
        """Raises InputError where held-out rows are needed, of every task, and are not there."""
        self._balanced: Any = objective.balanced
        self._config: Any = objective.Config(**config.objective.options)
        self._names = names
        self._processes = processes
        self._told = False
        self._watches = getattr(self._config, "watches", False)
        self.held_out = None if held_out is None else self._balanced(held_out, self._config, names)
        """The held-out batches, balanced as without any knowledge of them."""
        if self._watches:
            self._check()

    def warning(self, step: int, batches: Sequence[RaggedBatch]) -> Warning | None:
        """That a step lacks a task, whose share the others have then; the first time only."""
        lists = self._processes.exchange(self._missing(batches))
        missing = [name for name in lists[0] if all(name in others for others in lists)]
        if self._told or not missing:
            return None
        self._told = True
        return Warning(
            kind="task_missing",
            message=f"step {step}: expected rows of every task, got none of {', '.join(missing)}; shares hold within a "
            "step, among the tasks that it has",
            hint="more rows a step: training.batch_rows or training.gradient_accumulation_steps",
        )

    def balance(
        self, batches: Sequence[RaggedBatch], progress: Progress, loss: Loss, model: torch.nn.Module
    ) -> list[RaggedBatch]:
        """A step's batches with their weights; adds to `progress` what held-out rows say before the step."""
        if self._watches:
            seen = self._processes.exchange(self._look(progress, loss, model))
            progress.held_out.append(seen[0])  # the same in each, but for rounding on another kind of processor
        add = self._processes.add
        found: list[RaggedBatch] = self._balanced(batches, self._config, self._names, progress.held_out, add)
        return found

    @torch.no_grad()
    def _look(self, progress: Progress, loss: Loss, model: torch.nn.Module) -> list[float]:
        """The tasks' losses on a held-out batch, at first on all; a task that it doesn't have keeps its last one."""
        assert self.held_out is not None
        before = progress.held_out
        batches = [self.held_out[len(before) % len(self.held_out)]] if before else self.held_out
        sums = torch.zeros(2, len(self._names), dtype=torch.float64)
        model.eval()
        try:
            for batch in batches:
                parts = loss(batch)
                sums[0, : len(parts.sum)] += parts.sum.double().cpu()
                sums[1, : len(parts.count)] += parts.count.double().cpu()
        finally:
            model.train()
        last = before[-1] if before else [0.0] * len(self._names)
        return [total / count if count else was for total, count, was in zip(*sums.tolist(), last, strict=True)]

    def _missing(self, batches: Sequence[RaggedBatch]) -> list[str]:
        seen = {int(task) for batch in batches if batch.task is not None for task in batch.task.unique().tolist()}
        return [name for number, name in enumerate(self._names) if number not in seen]

    def _check(self) -> None:
        missing = self._missing(self.held_out or ())
        if missing:
            raise InputError(
                f"objective.balance: expected held-out rows of every task, got none of {', '.join(missing)}",
                "evaluation.split = 0.1 holds some out, evaluation.path names a file of them",
            )
