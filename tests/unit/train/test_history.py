"""`ftkit runs`: what it says of runs on disk, and what it removes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ftkit.cli import application
from ftkit.config import toml
from ftkit.errors import InputError
from ftkit.train import checkpoints, directory
from ftkit.train.events import Events

pytestmark = pytest.mark.unit


def make(runs: Path, name: str, *, finished: bool, rate: float, age: int) -> directory.RunDirectory:
    """A run as training leaves it."""
    run = directory.named(runs, name)
    for step in (10, 20, 30):
        folder = run.checkpoints / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    table = {"model": {"source": "m"}, "optimizer": {"learning_rate": rate}, "output": {"name": name}}
    run.config.write_text(toml.write(table))
    os.utime(run.config, (1e9 - age, 1e9 - age))
    events = Events(run.events, [])
    events.emit("started", 0, steps=30)
    events.emit("step", 1, loss=rate)
    events.emit("evaluation", 1, loss=2 * rate)
    events.emit("warning", 1, kind="x", message="look at this", hint="there")
    if finished:
        events.emit("finished", 30)
        run.result.write_text('{"run": "x"}')
    return run


def call(*words: str) -> Any:
    result = CliRunner().invoke(application(), ["runs", *words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_list_show_and_compare(tmp_path: Path) -> None:
    make(tmp_path, "new", finished=False, rate=0.5, age=1)
    make(tmp_path, "old", finished=True, rate=0.25, age=2)
    (tmp_path / "no run").mkdir()
    where = ["--runs-dir", str(tmp_path)]
    runs = call("list", *where)["runs"]
    assert [(run["run"], run["state"], run["steps"], run["of_steps"]) for run in runs] == [
        ("old", "finished", 1, 30),
        ("new", "unfinished", 1, 30),
    ]
    shown = call("show", "old", *where)
    assert (shown["loss"], shown["eval_loss"], shown["checkpoints"]) == (0.25, 0.5, 3)
    assert shown["config"]["optimizer"] == {"learning_rate": 0.25}
    assert [event["message"] for event in shown["warnings"]] == ["look at this"]
    assert call("compare", "old", "new", *where)["settings"] == {"optimizer.learning_rate": [0.25, 0.5]}
    for words in (["list"], ["show", "old"], ["compare", "old", "new"]):
        result = CliRunner().invoke(application(), ["runs", *words, *where], catch_exceptions=False)
        assert result.exit_code == 0
        assert "0.25" in result.output


def test_prune_leaves_what_can_be_continued(tmp_path: Path) -> None:
    new = make(tmp_path, "new", finished=False, rate=0.5, age=1)
    old = make(tmp_path, "old", finished=True, rate=0.25, age=2)
    removed = call("prune", "--keep", "1", "--runs-dir", str(tmp_path))["removed"]
    assert [Path(path).name for path in removed] == ["step-000010", "step-000020"]
    call("prune", "--runs-dir", str(tmp_path))
    assert checkpoints.every(old.checkpoints) == []
    assert len(checkpoints.every(new.checkpoints)) == 3
    assert old.events.exists()


def test_an_unknown_run_gets_the_nearest_name(tmp_path: Path) -> None:
    make(tmp_path, "second-try", finished=True, rate=0.5, age=1)
    with pytest.raises(InputError, match="did you mean 'second-try'"):
        directory.existing(tmp_path, "secnd-try")
    with pytest.raises(InputError, match="expected a run, got none"):
        directory.existing(tmp_path / "nowhere", "x")
