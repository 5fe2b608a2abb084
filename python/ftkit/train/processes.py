"""Several processes that train one run: each has the whole model and takes its part of every step's rows.

    torchrun --nproc-per-node 4 -m ftkit train …

A step's sum is a sum over rows, whoever computes them. So the gradients of sums are added up once a step, counts beside
them, and divided by the whole count; then every process makes the same update. What is trained is decided by the
configuration alone: the number of processes changes the time and the rounding, and a checkpoint of any number of them
is one of any other. The first process writes; the others are heard of when they fail.

Adapters, and frozen weights, are whole in each process. Where all weights are trained, processes share them out
(`sharding.py`).
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ftkit.config import RunConfig
from ftkit.errors import FtkitError, InputError

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "ncclRemoteError")
"""In what gloo and NCCL say when another process is gone."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    """Whether they share out the weights, so that each pass through the model is one of all."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def exchange(self, told: Found) -> list[Found]:
        """What every process tells here, in the order of their ranks."""
        if self.size == 1:
            return [told]
        heard: list[Any] = [None] * self.size
        distributed.all_gather_object(heard, told)
        return heard

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a tensor, the same bits in each; in place where there are several."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Adds up the parameters' gradients over all processes, in one flat buffer a dtype; missing ones count as 0."""
        if self.size == 1 or self.sharded:  # those are added up in the backward pass
            return
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for group in by_dtype.values():
            gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in group]
            flat = self.add(torch.cat([gradient.flatten() for gradient in gradients]))
            sizes = [parameter.numel() for parameter in group]
            for parameter, part in zip(group, flat.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)

    def rounds(self, batches: int) -> int:
        """How many batches this process makes a pass with, of which it has so many."""
        return max(self.exchange(batches)) if self.sharded else batches

    def agree(self, told: bool) -> bool:
        """Whether this process, or one that it shares weights with, says so."""
        return any(self.exchange(told)) if self.sharded else told

    def one_after_the_first(self, work: Callable[[], Found]) -> Found:
        """The first process works, then the others, who find on disk what it left there."""
        if self.size == 1 or self.first:
            found = work()
        self.exchange(None)
        return found if self.size == 1 or self.first else work()

    def part(self, portions: Sequence[list[int]]) -> list[list[int]]:
        """This process' part of a step's portions of rows: some of them, or else some of the rows of each.

        No portion becomes larger, so neither does the memory.
        """
        if len(portions) >= self.size:
            return list(portions[self.rank :: self.size])
        return [rows for rows in (portion[self.rank :: self.size] for portion in portions) if rows]

    def check(self, config: RunConfig) -> None:
        """Raises InputError where processes would have nothing to do, or gradients nothing to be added to."""
        training = config.training
        most = max(training.gradient_accumulation_steps, training.batch_rows)
        if most < self.size:
            raise InputError(
                f"training: expected a step of at least {self.size} batches, or batches of as many rows, for "
                f"{self.size} processes, got {training.gradient_accumulation_steps} of {training.batch_rows}",
                f"training.gradient_accumulation_steps = {self.size} gives each process a batch",
            )
        if self.size > 1 and training.optimizer_in_backward and not self.sharded:
            raise InputError(
                f"training.optimizer_in_backward: expected one process, or weights that processes share out, got "
                f"{self.size} with weights of their own",
                "method=full shares them out (training.shard)",
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Says in words what is heard here when another process is gone. Raises FtkitError for that."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(words in str(error) for words in _LOST):
                raise
            raise FtkitError(
                f"process {self.rank} of {self.size}: expected the others to go on, got one that has ended",
                "what it said stands apart; the last checkpoint is whole, and ftkit train --resume goes on from it",
            ) from error


ALONE = Processes()
"""A run of one process."""


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def join() -> Processes:
    """This process among those that torchrun has started; alone without it."""
    if launched() == 1:
        return ALONE
    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        # not after each run: a group made anew meets the addresses of the one before
        atexit.register(distributed.destroy_process_group)
    return Processes(distributed.get_rank(), distributed.get_world_size())
