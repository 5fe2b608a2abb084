"""An optimizer's state and inputs of layers on disk give the same bits as in memory, take none of it, and leave nothing
behind."""

import dataclasses
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
from ftkit.plan.speed import Speeds
from ftkit.train import checkpoint, fitting, memory, offload, planned, session
from ftkit.train.planned import Case, Way
from ftkit.train.processes import ALONE

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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_many_tensors_leave_a_process_its_descriptors(tmp_path: Path) -> None:
    before, shelf = len(os.listdir("/proc/self/fd")), offload.Shelf(tmp_path)
    sizes = [20_011 + 997 * (place % 7) for place in range(200)]
    sizes[100] = 17 << 20  # more than a mapping has
    held = {str(place): shelf.hold(str(place), torch.full((size,), float(place))) for place, size in enumerate(sizes)}
    assert len(os.listdir("/proc/self/fd")) - before <= 4
    for name, tensor in held.items():
        shelf.rest(name)
        assert (tensor == int(name)).all()


def test_what_waits_takes_no_memory(tmp_path: Path) -> None:
    def process_bytes() -> int:
        memory.keep_below(0, 0)  # what was freed is given back: the heap may keep a tensor of this size
        return memory.rss_bytes()

    file, count = offload.ActivationFile(tmp_path), 1 << 23
    before = process_bytes()
    held = file.write(torch.arange(count, dtype=torch.float32))  # 32 MiB
    assert process_bytes() < before + (4 << 20)
    assert torch.equal(file.read(held), torch.arange(count, dtype=torch.float32))
    assert process_bytes() < before + (4 << 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("what", ["optimizer", "activations"])
def test_a_full_disk_is_said(settings: Settings, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    config = RunConfig.from_toml(None, settings(training__offload=what))
    with pytest.raises(InputError, match=r"training\.offload: expected room for .* more in .*No space left"):
        train.run(config)


@pytest.mark.parametrize("what", ["optimizer", "activations"])
def test_what_cannot_go_to_disk_is_refused(settings: Settings, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, words = RunConfig.from_toml(None, settings(training__offload=what)), f"expected auto or none .* got {what}"
    with pytest.raises(InputError, match=words):
        session.build(config, lambda _: None, dataclasses.replace(ALONE, sharded=True))
    monkeypatch.setattr(session, "device_of", lambda _: torch.device("cuda"))
    with pytest.raises(InputError, match=words):
        session.build(config, lambda _: None)


@pytest.mark.parametrize("layers", [False, 0])
def test_without_recomputed_layers_no_inputs_wait(settings: Settings, layers: bool | int) -> None:
    table = settings(training__offload="activations", training__activation_checkpointing=layers)
    with pytest.raises(InputError, match="where no layers are recomputed, got activations"):
        RunConfig.from_toml(None, table)


def assert_same_in_less(on_disk: train.TrainResult, in_memory: train.TrainResult, near: float = 1.01) -> None:
    """The same to the bit, in less memory, and in what was planned, which is at most `near` times as much."""
    assert on_disk.adapter_sha256 == in_memory.adapter_sha256
    assert on_disk.final_loss == in_memory.final_loss
    assert on_disk.planned_peak_bytes is not None
    assert on_disk.peak_bytes <= on_disk.planned_peak_bytes <= near * on_disk.peak_bytes
    assert on_disk.peak_bytes < in_memory.peak_bytes


@pytest.mark.usefixtures("low")
def test_a_run_is_the_same_and_as_planned(settings: Settings) -> None:
    table = {key: value for key, value in settings(**FULL).items() if not key.startswith("method.")}
    config = RunConfig.from_toml(None, table)
    on_disk = train.run(config)
    plain = train.run(config.changed({"training.offload": "none", "output.name": "plain"}))
    assert_same_in_less(on_disk, plain)


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__dtype": "bfloat16"},
        {"model__quant": "nf4"},
        {"training__sparse_tokens": 0.5, "data__max_tokens": 512},
        {"method": "full", "training__gradient_accumulation_steps": 2},
        {"method": "full", "training__optimizer_in_backward": True, "training__max_gradient_norm": 0.0},
    ],
    ids=str,
)
def test_inputs_of_layers_wait_on_disk_for_the_same_gradients(settings: Settings, changes: dict[str, Any]) -> None:
    table = settings(training__max_steps=3, **changes)
    if "method" in changes:
        table = {key: value for key, value in table.items() if not key.startswith("method.")}
    config = RunConfig.from_toml(None, table | {"training.offload": "activations"})
    on_disk = train.run(config)
    kept = {"training.offload": "none", "training.activation_checkpointing": True, "output.name": "kept"}
    in_memory = train.run(config.changed(kept))
    assert_same_in_less(on_disk, in_memory, near=1.02 if "model__quant" in changes else 1.01)


@pytest.mark.usefixtures("low")
def test_both_go_to_disk_and_batches_are_cut_too(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {key: value for key, value in settings(**FULL).items() if not key.startswith("method.")}
    config = RunConfig.from_toml(None, table | {"training.offload": "auto", "data.max_tokens": 256})
    found = []
    for on_disk in (True, False):
        way = Way(recomputed=2, parts=4, state_on_disk=on_disk, activations_on_disk=on_disk)
        monkeypatch.setattr(fitting, "fastest", lambda case, _, way=way: case.plan(way))
        found.append(train.run(config.changed({"output.name": f"run-{on_disk}"})))
    assert found[0].adapter_sha256 == found[1].adapter_sha256
    assert found[0].planned_peak_bytes is not None
    assert found[0].peak_bytes <= found[0].planned_peak_bytes
    assert found[0].peak_bytes < found[1].peak_bytes


@pytest.mark.usefixtures("low")
def test_the_file_of_inputs_does_not_grow(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[tuple[int, int]] = []
    real, steps = os.posix_fallocate, []

    def reserve(file: int, start: int, size: int) -> None:
        reserved.append((start, size))
        real(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    table = settings(training__offload="activations", training__gradient_accumulation_steps=2)
    train.run(RunConfig.from_toml(None, table), steps.append)
    largest = max(event["tokens"] for event in steps if event["event"] == "step")
    assert [start for start, _ in reserved] == [0, reserved[0][1]]  # two layers' inputs of the largest batch
    assert reserved[0][1] == reserved[1][1] <= 4 * 32 * 2 * 128
    assert reserved[0][1] >= 4 * 32 * largest // 2


@pytest.mark.usefixtures("low")
def test_what_is_faster_goes_to_disk_where_nothing_else_fits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    roofs = dict.fromkeys(("float32", "bfloat16", "blocks", "attention", "bandwidth"), 1e15)
    monkeypatch.setattr(planned, "speeds", lambda: Speeds(**roofs, disk=1e6, call=0.0))
    table = {key: value for key, value in settings(**FULL).items() if not key.startswith("method.")}
    auto = RunConfig.from_toml(None, table | {"training.offload": "auto"})
    for tokens, faster, slower in ((64, "activations", "state"), (4096, "state", "activations")):
        config = auto.changed({"data.max_tokens": tokens, "training.batch_rows": 1})
        case = dataclasses.replace(Case.of_configuration(config), started_bytes=0)
        *_, in_memory, least = fitting.fit(case, 0)
        assert least.way.state_on_disk
        assert least.way.activations_on_disk
        assert not in_memory.way.state_on_disk
        assert not in_memory.way.activations_on_disk
        chosen = fitting.fastest(case, in_memory.needed_bytes - 1)
        assert getattr(chosen.way, f"{faster}_on_disk")
        assert not getattr(chosen.way, f"{slower}_on_disk")
        assert chosen.seconds_per_step is not None
        assert in_memory.seconds_per_step is not None
        assert chosen.seconds_per_step > in_memory.seconds_per_step
        assert fitting.fastest(case, least.needed_bytes).way == least.way
        none = dataclasses.replace(case, config=config.changed({"training.offload": "none"}))
        with pytest.raises(InputError, match="at the least"):
            fitting.fastest(none, in_memory.needed_bytes - 1)


def test_a_long_row_has_its_inputs_on_disk(settings: Settings) -> None:
    config = RunConfig.from_toml(None, settings(data__max_tokens=2048, training__batch_rows=1))
    case = dataclasses.replace(Case.of_configuration(config), started_bytes=0)
    *_, in_memory, least = fitting.fit(case, 0)
    chosen = fitting.fastest(case, in_memory.needed_bytes - 1)
    assert chosen.way == Way(recomputed=2, activations_on_disk=True)
    assert "2 layers are recomputed in the backward pass, whose inputs wait for it on disk" in fitting.described(
        least.way
    )
    asked = dataclasses.replace(case, config=config.changed({"training.offload": "activations"}))
    assert [plan.way for plan in fitting.fit(asked, chosen.needed_bytes)] == [chosen.way]
