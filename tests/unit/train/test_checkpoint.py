"""A checkpoint gives back exactly what was saved, and refuses what does not fit."""

from pathlib import Path

import pytest
import torch

from ftkit.config import Choice
from ftkit.errors import InputError
from ftkit.optim import Optimizer, build
from ftkit.train import checkpoint, checkpoints

pytestmark = pytest.mark.unit


def parameters(rank: int = 3, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(rank)
    return {"a.lora_A": torch.nn.Parameter(torch.randn(rank, 7)), "b": torch.nn.Parameter(torch.randn(5).to(dtype))}


def saved(folder: Path, step: int) -> tuple[dict[str, torch.nn.Parameter], Optimizer, Path]:
    weights = parameters()
    optimizer = build(Choice(name="adamw"), weights)
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    optimizer.step(1.0)
    progress = checkpoint.Progress(step=step, batches=7, best_loss=0.1 + 0.2, loss=1 / 3, tokens=10**12)
    return weights, optimizer, checkpoint.save(folder, progress, weights, optimizer, lambda path: path.mkdir())


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    weights, optimizer, path = saved(tmp_path, 41)
    assert path.name == "step-000041"
    others = {name: torch.nn.Parameter(torch.zeros_like(weight)) for name, weight in weights.items()}
    fresh = build(Choice(name="adamw"), others)
    progress = checkpoint.load(path, others, fresh)
    assert (progress.step, progress.batches, progress.best_loss, progress.loss) == (41, 7, 0.1 + 0.2, 1 / 3)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    state, expected = fresh.state(), optimizer.state()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("other", [parameters(rank=4), parameters(dtype=torch.float32), {}])
def test_parameters_of_another_configuration_are_refused(tmp_path: Path, other: dict[str, torch.nn.Parameter]) -> None:
    _, _, path = saved(tmp_path, 1)
    with pytest.raises(InputError, match="expected the parameters of this configuration"):
        checkpoint.load(path, other, build(Choice(name="adamw"), other))


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, None])
def test_a_damaged_checkpoint_is_an_input_error(tmp_path: Path, name: str, content: bytes | None) -> None:
    weights, _, path = saved(tmp_path, 1)
    if content is None:
        (path / name).unlink()
    elif (name, content) == ("state.json", b"{}"):
        (path / name).write_text('{"step": 1, "colour": 2}')
    else:
        (path / name).write_bytes(content)
    with pytest.raises(InputError, match="step-000001: expected"):
        checkpoint.load(path, weights, build(Choice(name="adamw"), weights))


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        saved(tmp_path, step)
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-000200").mkdir()  # without a state: not a checkpoint
    checkpoints.prune(tmp_path, 0, None)
    assert [checkpoints.step_of(path) for path in checkpoints.every(tmp_path)] == [1, 2, 10, 100]
    checkpoints.prune(tmp_path, 2, 1)
    assert [checkpoints.step_of(path) for path in checkpoints.every(tmp_path)] == [1, 10, 100]
