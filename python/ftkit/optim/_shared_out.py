"""An optimizer over parameters that several processes share out by rows: each has its part of the state, too.

Where a rule moves each entry by itself, a process moves its own rows. A matrix that only moves as a whole (Muon's
directions, Adafactor's rows and columns, blocks of 8 bits) has an owner, who has all of its state: he is sent the
gradient and the weight, makes the update of one process to the bit, and sends the rows back. Owners work at the same
time, each on a matrix of his own, so that there is never more than one whole matrix in a process.

Source of the owners: Liu et al., Muon is Scalable for LLM Training, 2025, arXiv 2502.16982 ("Distributed Muon").
"""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ftkit.nn.shards import Whole, is_shared_out, local, rows_of
from ftkit.optim._optimizer import Optimizer, Rule, check


class SharedOut:
    """As `Optimizer`; what it does, all processes of the group do in the same order."""

    learning_rate: float
    """The rate that a schedule's factor of 1 stands for."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], rule: Rule, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self._rule = rule
        self._parameters: dict[str, Any] = dict(parameters)
        self._mesh: Any = next(p.device_mesh for p in self._parameters.values() if is_shared_out(p))
        self._group: distributed.ProcessGroup = self._mesh.get_group()
        self._rank, self._size = self._mesh.get_local_rank(), self._mesh.size()
        whole = {name: p.numel() for name, p in parameters.items() if not rule.elementwise(name, p)}
        self._owners = owners(whole, self._size)
        # an owner's weights are only with him while they move
        placeholders = {name: self._placeholder(name) for name in self._owners if self._owners[name] == self._rank}
        rows = {name: nn.Parameter(local(p.detach())) for name, p in parameters.items() if name not in self._owners}
        mine = {name: placeholders.get(name, rows.get(name)) for name in parameters}
        self._mine = Optimizer({n: p for n, p in mine.items() if p is not None}, rule, learning_rate)
        copies = self._mine.state()
        for name in self._owners:
            if self._parameters[name].dtype != torch.float32:
                values = Whole.of(self._parameters[name].detach()).gather()
                if self._owners[name] == self._rank:
                    copies[f"copy/{name}"].copy_(values)

    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate; a parameter without a gradient stays as it is."""
        self.begin()
        for name, parameter in self._parameters.items():
            if name not in self._owners and parameter.grad is not None:
                self.update(name, factor)
        for names in _rounds(self._owners, self._size):
            self._move([name for name in names if self._parameters[name].grad is not None], factor)

    def rest(self, name: str) -> None:
        """As `Optimizer.rest`: all states are in memory here."""

    def begin(self) -> None:
        """Counts a step, whose updates follow."""
        self._mine.begin()

    @torch.no_grad()
    def update(self, name: str, factor: float) -> None:
        """One parameter's part of the step; it has a gradient."""
        if name in self._owners:
            self._move([name], factor)
        else:
            parameter = self._parameters[name]
            self._mine.move(name, local(parameter.detach()), local(parameter.grad), factor)

    @torch.no_grad()
    def _move(self, names: list[str], factor: float) -> None:
        """Moves whole matrices, each of another owner."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name in names:
            parameter, owner = self._parameters[name], self._owners[name]
            gradient = self._send(local(parameter.grad), parameter.shape, owner)
            weight = self._send(local(parameter.detach()), parameter.shape, owner)
            if gradient is not None and weight is not None:
                found[name] = weight, gradient
        for name, (weight, gradient) in found.items():
            rows = self._parameters[name].shape[0]
            self._mine.move(name, weight[:rows], gradient[:rows], factor)
        for name in names:
            weights = found.pop(name, (None,))[0]
            self._send_back(weights, local(self._parameters[name].detach()), self._parameters[name].shape[0], name)

    def _send(self, rows: Tensor, shape: torch.Size, owner: int) -> Tensor | None:
        """All processes' rows, for the owner; the last ones filled up, since all send the same."""
        each = -(-shape[0] // self._size)
        sent = rows.contiguous() if len(rows) == each else rows.new_zeros(each, *shape[1:])
        if len(rows) < each:
            sent[: len(rows)] = rows
        whole = rows.new_empty(each * self._size, *shape[1:]) if owner == self._rank else None
        parts = None if whole is None else list(whole.split(each))
        distributed.gather(sent, parts, group=self._group, group_dst=owner)
        return whole

    def _send_back(self, whole: Tensor | None, rows: Tensor, count: int, name: str) -> None:
        """Rows of what the owner has into everybody's."""
        each = -(-count // self._size)
        got = rows.new_empty(each, *rows.shape[1:])
        parts = None if whole is None else list(whole.split(each))
        distributed.scatter(got, parts, group=self._group, group_src=self._owners[name])
        rows.copy_(got[: len(rows)])

    def state(self) -> dict[str, Tensor]:
        """This process' part of what `Optimizer.state` gives."""
        return self._mine.state()

    def wholes(self) -> dict[str, Whole]:
        """What the state of one process would be."""
        here, found = self.state(), {}
        for name, parameter in self._parameters.items():
            owner = self._owners.get(name)
            for kind, like in self._kinds(name).items():
                key = f"{kind}/{name}"
                if owner is None:
                    gather = self._gathered(here[key], parameter)
                else:
                    gather = self._sent_round(here.get(key), like, owner)
                found[key] = Whole(tuple(like.shape), like.dtype, gather)
        return found | {"steps": Whole.of(here["steps"])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `wholes` gave, or one process' `state`. Raises KeyError and RuntimeError as `Optimizer`."""
        check(self.wholes(), state)
        here = self.state()
        for key, tensor in here.items():
            name = key.partition("/")[2]
            if name in self._owners:
                tensor.copy_(state[key])
            elif name:
                rows = rows_of(self._parameters[name].shape[0], self._rank, self._size)
                tensor.copy_(state[key][rows])
        self._mine.count(int(state["steps"]))

    def _kinds(self, name: str) -> dict[str, Tensor]:
        """Tensors without memory that are like a parameter's whole state."""
        like = torch.empty(self._parameters[name].shape, dtype=self._parameters[name].dtype, device="meta")
        copy = {} if like.dtype == torch.float32 else {"copy": like.float()}
        return self._rule.state(name, like) | copy

    def _gathered(self, rows: Tensor, parameter: Any) -> Any:
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(
            rows,
            self._mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return whole.full_tensor

    def _sent_round(self, held: Tensor | None, like: Tensor, owner: int) -> Any:
        def gather() -> Tensor:
            tensor = held
            if tensor is None:
                tensor = torch.empty_like(like, device=local(next(iter(self._parameters.values()))).device)
            distributed.broadcast(tensor, group=self._group, group_src=owner)
            return tensor

        return gather

    def _placeholder(self, name: str) -> nn.Parameter:
        """Of a parameter's shape and type, without its memory."""
        parameter = self._parameters[name]
        device = local(parameter).device
        return nn.Parameter(torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape))


def owners(entries: Mapping[str, int], size: int) -> dict[str, int]:
    """Who owns which matrix: the largest first, each to the one who has least."""
    held = [0] * size
    found: dict[str, int] = {}
    for name in sorted(entries, key=lambda name: -entries[name]):
        found[name] = held.index(min(held))
        held[found[name]] += entries[name]
    return found


def _rounds(owners: Mapping[str, int], size: int) -> Iterator[list[str]]:
    """Matrices that move at the same time, each of another owner."""
    held: list[list[str]] = [[] for _ in range(size)]
    for name, owner in owners.items():
        held[owner].append(name)
    for names in zip_longest(*held):
        yield [name for name in names if name is not None]
