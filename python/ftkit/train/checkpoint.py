"""Checkpoints: all that an uninterrupted run would hold after a step, as plain files.

    step-000100/
      state.json               counters, the position in the data, the best evaluation so far
      weights.safetensors      the trained parameters, exactly
      optimizer.safetensors    the optimizer's state by parameter name
      adapter/                 the same weights in the format that chat, serve and merge take

There is no random state in it: the randomness of a step is a function of the seed and the step's number, so neither
an evaluation nor a resume can shift it.

Processes that share out weights write what one would, gathered tensor by tensor, and each reads its part.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftkit.errors import InputError
from ftkit.nn.shards import Whole, fill, write
from ftkit.optim import Optimizer, SharedOut
from ftkit.train import files

Parameters = Mapping[str, torch.nn.Parameter]


@dataclasses.dataclass(kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    batches: int = 0
    """Forward passes done: the position in the data's order."""
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    """Spent in steps."""
    loss: float | None = None
    """Of the last step."""
    best_loss: float | None = None
    """The lowest evaluation loss."""
    best_step: int | None = None
    evaluations_without_better: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    peak_bytes: int = 0
    parts: int = 1
    """What each batch is cut into, for want of memory."""
    exact: bool = False
    """Whether products in 8 bits were given up."""
    held_out: list[list[float]] = dataclasses.field(default_factory=list)
    """The tasks' losses on held-out rows in each step, where the objective follows them."""


def save(
    folder: Path,
    progress: Progress,
    parameters: Parameters,
    optimizer: Optimizer | SharedOut,
    save_adapter: Callable[[Path], Any],
) -> Path:
    """Writes the checkpoint of the progress' step below `folder`, whole or not at all; its path."""
    path = folder / f"step-{progress.step:06d}"
    with files.new_directory(path) as temporary:
        write(temporary / "weights.safetensors", _wholes(parameters))
        write(temporary / "optimizer.safetensors", optimizer.wholes())
        for name in parameters:
            optimizer.rest(name)
        save_adapter(temporary / "adapter")
        (temporary / "state.json").write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")
    return path


def give(parameters: Parameters, optimizer: Optimizer | SharedOut, save_adapter: Callable[[None], Any]) -> None:
    """Takes part in gathering what another process writes with `save`."""
    write(None, _wholes(parameters))
    write(None, optimizer.wholes())
    save_adapter(None)


def _wholes(parameters: Parameters) -> dict[str, Whole]:
    return {name: Whole.of(parameter.detach()) for name, parameter in parameters.items()}


def load(path: Path, parameters: Parameters, optimizer: Optimizer | SharedOut) -> Progress:
    """Fills parameters and optimizer from a checkpoint. Raises InputError when it does not fit them."""
    with contextlib.ExitStack() as opened:
        try:
            progress = Progress(**json.loads((path / "state.json").read_text(encoding="utf-8")))
            weights = opened.enter_context(_Stored.opened(path / "weights.safetensors"))
            state = opened.enter_context(_Stored.opened(path / "optimizer.safetensors"))
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise InputError(f"{path}: expected a checkpoint, got: {str(error).lower()}") from None
        expected = {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
        if expected != found:
            name = next(iter(sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))))
            raise InputError(
                f"{path}: expected the parameters of this configuration, got others: {name} should be "
                f"{expected.get(name, 'absent')} and is {found.get(name, 'absent')}"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                fill(parameter.detach(), weights[name])
        try:
            optimizer.load(state)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{path}: expected the state of this optimizer, got another ({error})") from None
    return progress


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = dict.fromkeys(file.keys())

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator["_Stored"]:
        with safe_open(path, framework="pt") as file:
            yield cls(file)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
