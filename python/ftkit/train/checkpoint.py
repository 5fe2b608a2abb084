"""Checkpoints: all that an uninterrupted run would hold after a step, as plain files.

    step-000100/
      state.json               counters, the position in the data, the best evaluation so far
      weights.safetensors      the trained parameters, exactly
      optimizer.safetensors    the optimizer's state by parameter name
      adapter/                 the same weights in the format that chat, serve and merge take

There is no random state in it: the randomness of a step is a function of the seed and the step's number, so neither
an evaluation nor a resume can shift it.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ftkit.errors import InputError
from ftkit.optim import Optimizer
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
    optimizer: Optimizer,
    save_adapter: Callable[[Path], Any],
) -> Path:
    """Writes the checkpoint of the progress' step below `folder`, whole or not at all; its path."""
    path = folder / f"step-{progress.step:06d}"
    with files.new_directory(path) as temporary:
        save_file(_stored(parameters), temporary / "weights.safetensors")
        _write(optimizer, temporary / "optimizer.safetensors")
        save_adapter(temporary / "adapter")
        (temporary / "state.json").write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")
    return path


def load(path: Path, parameters: Parameters, optimizer: Optimizer) -> Progress:
    """Fills parameters and optimizer from a checkpoint. Raises InputError when it does not fit them."""
    try:
        progress = Progress(**json.loads((path / "state.json").read_text(encoding="utf-8")))
        weights = load_file(path / "weights.safetensors")
        state = load_file(path / "optimizer.safetensors")
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
            parameter.copy_(weights[name])
    try:
        optimizer.load(state)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path}: expected the state of this optimizer, got another ({error})") from None
    return progress


def _write(optimizer: Optimizer, path: Path) -> None:
    """Writes the optimizer's state, one tensor after the other, since it may be on disk for want of memory."""
    state, header, end = optimizer.state(), {}, 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):  # all aligned
        kind = _SAFETENSORS[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name in header:
            tensor = state[name].detach().contiguous().cpu()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            optimizer.rest(name.partition("/")[2])


_SAFETENSORS = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
"""What the states of optimizers consist of, by the format's names."""


def _stored(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
