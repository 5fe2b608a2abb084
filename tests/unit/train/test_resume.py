"""Interrupted at any moment, a run continues to the same bits: real processes, real signals, a disk that fills up."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftkit import train
from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.train import checkpoints, directory, events
from ftkit.train.result import sha256_of

pytestmark = [pytest.mark.unit, pytest.mark.slow]

STEPS = 24
ON_DISK = """
import runpy
from ftkit.train import fitting, offload, planned
offload.LEAST_BYTES = 64
way = planned.Way(recomputed=2, state_on_disk=True, activations_on_disk=True)
fitting.fastest = lambda case, _: case.plan(way)
runpy.run_module("ftkit", None, "__main__")
"""
"""ftkit with all on disk that can be, small tensors, too."""


@pytest.fixture
def chosen(settings: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return settings(
        training__max_steps=STEPS, training__gradient_accumulation_steps=2, training__batch_rows=1,
        evaluation__split=0.2, evaluation__every_steps=4, output__checkpoint_every_steps=3,
    )  # fmt: skip


Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts `ftkit train` with settings in a process of its own; `limit` is the most bytes a file may have, `program`
    what runs instead of the module."""
    started: list[subprocess.Popen[str]] = []

    def start(
        settings: dict[str, Any], *options: str, limit: int | None = None, program: str | None = None
    ) -> subprocess.Popen[str]:
        def prepare() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        run = ["-m", "ftkit"] if program is None else ["-c", program]
        command = [sys.executable, *run, "train", *given, *options]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, preexec_fn=prepare))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def folder(settings: dict[str, Any]) -> directory.RunDirectory:
    return directory.named(settings["output.runs_dir"], settings["output.name"])


def story(settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The losses of a run, of training and of evaluation."""
    found = events.read(folder(settings).events)
    return [(e["event"], e["step"], e["loss"]) for e in found if e["event"] in ("step", "evaluation")]


def wait_for(process: subprocess.Popen[str], settings: dict[str, Any], event: str, times: int) -> None:
    """Returns when the run has told of so many events, or has ended."""
    path = folder(settings).events
    deadline = time.monotonic() + 600
    while process.poll() is None:
        assert time.monotonic() < deadline, f"expected {times} of {event}"
        if path.exists() and path.read_text(errors="replace").count(f'"event": "{event}"') >= times:
            return
        time.sleep(0.001)


def whole(settings: dict[str, Any]) -> bool:
    """Whether every checkpoint that a reader sees is complete."""
    names = {"state.json", "weights.safetensors", "optimizer.safetensors", "adapter"}
    return all(
        {path.name for path in found.iterdir()} == names for found in checkpoints.every(folder(settings).checkpoints)
    )


@pytest.fixture
def straight(chosen: dict[str, Any]) -> tuple[str, list[tuple[Any, ...]]]:
    """The hash and the story of the run that nobody disturbs."""
    undisturbed = chosen | {"output.name": "straight"}
    result = train.run(RunConfig.from_toml(None, undisturbed))
    return result.adapter_sha256, story(undisturbed)


def test_killed_at_random_moments_and_resumed(
    spawn: Spawn, chosen: dict[str, Any], straight: tuple[str, list[tuple[Any, ...]]]
) -> None:
    dice = random.Random(time.time_ns())
    options: tuple[str, ...] = ()
    for step in (2, 11):
        process = spawn(chosen, *options)
        wait_for(process, chosen, "step", step)
        time.sleep(dice.random() * 0.04)
        process.kill()
        process.communicate()
        assert whole(chosen)
        done = max((event["step"] for event in events.read(folder(chosen).events)), default=0)
        kept = checkpoints.every(folder(chosen).checkpoints)
        assert done - (checkpoints.step_of(kept[-1]) if kept else 0) <= 3
        options = ("--resume",)
    result = train.run(train.resumed_config(None, chosen), resume=True)
    assert story(chosen) == straight[1]
    assert result.adapter_sha256 == straight[0]
    assert not list(folder(chosen).path.rglob(".tmp-*"))


def sizes_on_disk(process: subprocess.Popen[str], scratch: Path) -> dict[int, int]:
    """The bytes of the files without a name that a process has in a folder, by their inodes."""
    files = [entry for entry in Path(f"/proc/{process.pid}/fd").iterdir() if str(scratch) in os.readlink(entry)]
    return {entry.stat().st_ino: entry.stat().st_size for entry in files}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_killed_with_files_on_disk_and_resumed(
    spawn: Spawn, chosen: dict[str, Any], straight: tuple[str, list[tuple[Any, ...]]]
) -> None:
    scratch = Path(os.environ["FTKIT_CACHE"]) / "scratch"
    process = spawn(chosen, program=ON_DISK)
    wait_for(process, chosen, "step", 7)
    os.kill(process.pid, signal.SIGSTOP)
    sizes = sizes_on_disk(process, scratch)
    process.kill()
    _, errors = process.communicate()
    assert len(sizes) == 2, errors  # the optimizer's state, inputs of layers
    assert min(sizes.values()) > 0
    assert not list(scratch.iterdir())
    assert checkpoints.every(folder(chosen).checkpoints)
    process = spawn(chosen, "--resume", program=ON_DISK)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert story(chosen) == straight[1]
    assert sha256_of(folder(chosen).adapter) == straight[0]
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_run_after_its_step_with_a_checkpoint(
    spawn: Spawn, chosen: dict[str, Any], straight: tuple[str, list[tuple[Any, ...]]], number: signal.Signals
) -> None:
    process = spawn(chosen)
    wait_for(process, chosen, "step", 5)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "interrupted after step" in errors
    assert "ftkit train --resume --name run" in errors
    found = events.read(folder(chosen).events)
    assert found[-1]["event"] == "interrupted"
    assert checkpoints.step_of(checkpoints.every(folder(chosen).checkpoints)[-1]) == found[-1]["step"]
    assert found[-1]["step"] < STEPS
    result = train.run(train.resumed_config(None, chosen), resume=True)
    assert (result.adapter_sha256, story(chosen)) == straight


def test_the_second_signal_stops_at_once_and_leaves_nothing_half_written(
    spawn: Spawn, chosen: dict[str, Any], straight: tuple[str, list[tuple[Any, ...]]]
) -> None:
    process = spawn(chosen)
    wait_for(process, chosen, "step", 4)
    process.send_signal(signal.SIGINT)
    time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert whole(chosen)
    assert not list(folder(chosen).path.rglob(".tmp-*"))
    result = train.run(train.resumed_config(None, chosen), resume=True)
    assert (result.adapter_sha256, story(chosen)) == straight


def test_the_second_signal_does_not_wait_for_the_step(spawn: Spawn, chosen: dict[str, Any]) -> None:
    process = spawn(chosen | {"training.gradient_accumulation_steps": 50_000, "evaluation.split": 0.0})
    wait_for(process, chosen, "started", 1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped at once" in errors


def test_a_full_disk_ends_the_run_with_words_and_loses_nothing(
    spawn: Spawn, chosen: dict[str, Any], straight: tuple[str, list[tuple[Any, ...]]]
) -> None:
    largest = folder(chosen | {"output.name": "straight"}).checkpoints / f"step-{STEPS:06d}" / "optimizer.safetensors"
    process = spawn(chosen, limit=largest.stat().st_size - 1)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "expected room for this file, got: file too large" in errors
    assert "hint: everything written before is whole" in errors
    assert "Traceback" not in errors
    assert not list(folder(chosen).path.rglob(".tmp-*"))
    result = train.run(train.resumed_config(None, chosen), resume=True)
    assert (result.adapter_sha256, story(chosen)) == straight


def test_two_processes_cannot_train_the_same_run(spawn: Spawn, chosen: dict[str, Any]) -> None:
    process = spawn(chosen | {"training.max_steps": 2000})
    wait_for(process, chosen, "step", 1)
    with pytest.raises(InputError, match="got one that another process has"):
        train.run(train.resumed_config(None, chosen), resume=True)
    with pytest.raises(InputError, match="got one that another process has"):
        train.run(RunConfig.from_toml(None, chosen), overwrite=True)
    assert process.poll() is None
