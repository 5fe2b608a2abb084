"""What all optimizers share: which parameters, their state by name, and the update of one after the other.

Weights in bfloat16 keep 8 bits of mantissa: an update below 1/256 of a weight would round away. They get a float32
copy that takes the updates and is rounded into them after each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ftkit.nn.shards import Whole

CHUNK = 1 << 20
"""Elements that a rule works on at a time where it needs memory for them: 4 MiB of float32."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What an update is told besides tensors."""

    step: int
    """The number of the step, from 1."""
    rate: float
    """The learning rate now."""
    decays: bool
    """Whether weight decay applies to the parameter."""


class Rule(Protocol):
    """How one parameter moves. Knows no parameter but the one that it is given."""

    def state(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """A new parameter's state by kind, such as `mean`."""
        ...

    def elementwise(self, name: str, weight: Tensor) -> bool:
        """Whether each entry of the parameter moves by itself, and its state has its shape: some rows may move alone.

        Of the weight, only shape and type are looked at.
        """
        ...

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], moment: Moment) -> None:
        """Moves the weight (float32, contiguous) and its state in place; the gradient may be of another dtype."""
        ...


class Place(Protocol):
    """Where a state lies, if not in memory."""

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the same values, there; `name` is the parameter's."""
        ...

    def rest(self, name: str) -> None:
        """Nothing will touch the parameter's state for a while."""
        ...


class Optimizer:
    """A rule over named parameters.

    `step` updates all that have a gradient. `begin` and then `update` for each name are the same in parts, for those
    who give up a gradient before the next one is there.
    """

    learning_rate: float
    """The rate that a schedule's factor of 1 stands for."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        rule: Rule,
        learning_rate: float,
        place: Place | None = None,
    ) -> None:
        self.learning_rate = learning_rate
        self._rule = rule
        self._parameters = dict(parameters)
        self._steps = 0
        self._place = place
        self._states, self._copies = {}, {}
        for name, parameter in parameters.items():  # one after the other, so that each can go to its place
            held = {kind: self._held(name, each) for kind, each in rule.state(name, parameter.detach()).items()}
            self._states[name] = held
            if parameter.dtype != torch.float32:
                self._copies[name] = self._held(name, parameter.detach().float())

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self._place is None else self._place.hold(name, tensor)

    def rest(self, name: str) -> None:
        """Says that a parameter's state is not needed until its next update; it may be used all the same."""
        if self._place is not None:
            self._place.rest(name)

    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate; a parameter without a gradient stays as it is."""
        self.begin()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.update(name, factor)

    def begin(self) -> None:
        """Counts a step, whose updates follow."""
        self._steps += 1

    def count(self, steps: int) -> None:
        """Goes on after so many steps."""
        self._steps = steps

    @torch.no_grad()
    def update(self, name: str, factor: float) -> None:
        """One parameter's part of the step; it has a gradient."""
        parameter = self._parameters[name]
        assert parameter.grad is not None
        self.move(name, parameter.detach(), parameter.grad, factor)

    def move(self, name: str, values: Tensor, gradient: Tensor, factor: float) -> None:
        """As `update`, for a weight and a gradient that are given; contiguous, no parameters."""
        weight = self._copies.get(name, values)
        moment = Moment(step=self._steps, rate=self.learning_rate * factor, decays=_decays(name, weight))
        self._rule.update(weight, gradient, self._states[name], moment)
        if weight is not values:
            values.copy_(weight)
        self.rest(name)

    def state(self) -> dict[str, Tensor]:
        """All that an uninterrupted run would have, down to the bit: `steps`, `KIND/NAME`, and `copy/NAME`, float32."""
        state = {f"{kind}/{name}": tensor for name, kinds in self._states.items() for kind, tensor in kinds.items()}
        state |= {f"copy/{name}": copy for name, copy in self._copies.items()}
        return state | {"steps": torch.tensor(self._steps, dtype=torch.int64)}

    def wholes(self) -> dict[str, Whole]:
        """What `state` gives, for a checkpoint."""
        return {name: Whole.of(tensor) for name, tensor in self.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave. Raises KeyError for other names and RuntimeError for other tensors."""
        check(self.wholes(), state)
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
            self.rest(name.partition("/")[2])
        self.count(int(state["steps"]))


def check(expected: Mapping[str, Whole], state: Mapping[str, Tensor]) -> None:
    """Raises KeyError where names differ, and RuntimeError where tensors do."""
    for name in sorted(expected.keys() ^ state.keys()):
        raise KeyError(name)
    for name, one in expected.items():
        given = state[name]
        if (tuple(given.shape), given.dtype) != (one.shape, one.dtype):
            raise RuntimeError(f"{name} should be {one.shape, one.dtype} and is {tuple(given.shape), given.dtype}")


def zeros(weight: Tensor) -> Tensor:
    """State of a weight's shape, float32."""
    return torch.zeros_like(weight, dtype=torch.float32)


def chunks(gradient: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The gradient in float32 and the (contiguous) tensors beside it, `CHUNK` elements at a time, flat."""
    flat = [gradient.reshape(-1), *(tensor.view(-1) for tensor in tensors)]
    for start in range(0, gradient.numel(), CHUNK):
        part, *rest = (tensor[start : start + CHUNK] for tensor in flat)
        yield (part.float(), *rest)


def _decays(name: str, weight: Tensor) -> bool:
    """Whether weight decay applies: to matrices, except embeddings.

    Vectors (norms, biases) and embeddings don't decay, since pulling those to zero shrinks activations rather than
    complexity.
    """
    return weight.ndim >= 2 and "embed_tokens" not in name
