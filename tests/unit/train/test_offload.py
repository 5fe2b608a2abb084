"""An optimizer's state on disk gives the same bits as in memory, takes none of it, and leaves nothing behind."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftkit import optim, plugins, train
from ftkit.config import Choice, RunConfig
from ftkit.errors import InputError
from ftkit.train import checkpoint, fitting, memory, offload
from ftkit.train.planned import Case, Way

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]
FULL = {"training__offload": "optimizer", "method": "full", "training__max_steps": 3}


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors go to disk, too."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 64)


def _parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"a.weight": (67, 71), "norm.weight": (13,), "b.weight": (1031, 5)}
    return {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}


def _moved(optimizer: optim.Optimizer, parameters: dict[str, torch.nn.Parameter], steps: int) -> None:
    dealt = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=dealt).to(parameter.dtype)
        optimizer.step(1.0)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", plugins.names("optim"))
def test_updates_are_the_same_to_the_bit_and_come_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = []
    for place in (None, offload.Shelf(tmp_path / "scratch")):
        parameters = _parameters(dtype)
        optimizer = optim.build(Choice(name=name, options={"learning_rate": 0.01}), parameters, place)
        _moved(optimizer, parameters, 3)
        made.append((parameters, optimizer))
    (plain, _), (parameters, optimizer) = made
    path = checkpoint.save(tmp_path, checkpoint.Progress(step=3), parameters, optimizer, lambda _: None)
    stored, state = load_file(path / "optimizer.safetensors"), made[0][1].state()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], state[key]) and stored[key].dtype == state[key].dtype for key in state)
    again = _parameters(dtype)
    resumed = optim.build(Choice(name=name, options={"learning_rate": 0.01}), again, offload.Shelf(tmp_path / "more"))
    checkpoint.load(path, again, resumed)
    for each, others in ((resumed, again), (optimizer, parameters), (made[0][1], plain)):
        _moved(each, others, 2)
    for key, expected in plain.items():
        assert torch.equal(expected, parameters[key])
        assert torch.equal(expected, again[key])


def test_what_rests_takes_no_memory(tmp_path: Path) -> None:
    shelf, values = offload.Shelf(tmp_path), torch.arange(1 << 23, dtype=torch.float32)  # 32 MiB
    before = memory.rss_bytes()
    held = shelf.hold("a", values)
    assert memory.rss_bytes() < before + (4 << 20)
    assert torch.equal(held, values)
    assert memory.rss_bytes() > before + (28 << 20)
    shelf.rest("a")
    assert memory.rss_bytes() < before + (4 << 20)
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"training\.offload: expected room for .* more in .*No space left"):
        offload.Shelf(tmp_path).hold("a", torch.zeros(1 << 15))


@pytest.mark.usefixtures("low")
def test_a_run_is_the_same_and_as_planned(settings: Settings) -> None:
    table = {key: value for key, value in settings(**FULL).items() if not key.startswith("method.")}
    config = RunConfig.from_toml(None, table)
    on_disk = train.run(config)
    plain = train.run(config.changed({"training.offload": "none", "output.name": "plain"}))
    assert on_disk.adapter_sha256 == plain.adapter_sha256
    assert on_disk.final_loss == plain.final_loss
    assert on_disk.planned_peak_bytes is not None
    assert on_disk.peak_bytes <= on_disk.planned_peak_bytes <= 1.01 * on_disk.peak_bytes
    assert on_disk.peak_bytes < plain.peak_bytes


@pytest.mark.usefixtures("low")
def test_it_is_chosen_where_nothing_cheaper_fits(settings: Settings) -> None:
    table = {key: value for key, value in settings(**FULL).items() if not key.startswith("method.")}
    config = RunConfig.from_toml(None, table | {"training.offload": "auto"})
    case = Case.of_configuration(config)
    in_memory = fitting.fit(case, 0)
    assert in_memory[-1].way.state_on_disk
    assert not any(plan.way.state_on_disk for plan in in_memory[:-1])
    room = in_memory[-2].needed_bytes - 1
    chosen = fitting.fastest(case, room)
    assert chosen.way.state_on_disk
    assert chosen.seconds_per_step is not None
    alike = case.plan(Way(recomputed=chosen.way.recomputed, parts=chosen.way.parts)).seconds_per_step
    assert alike is not None
    assert chosen.seconds_per_step > alike
    with pytest.raises(InputError, match="at the least"):
        fitting.fastest(Case.of_configuration(config.changed({"training.offload": "none"})), room)
