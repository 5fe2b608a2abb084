"""Several processes train what one does, and each goes on from the other's checkpoint."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftkit import train
from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.train import events
from ftkit.train.processes import Processes
from ftkit.train.signals import Interruption

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]

TWICE = """
import json, sys
from ftkit.cli import application

for words in json.load(open(sys.argv[1])):
    application()(words, standalone_mode=False)
"""


def words(table: dict[str, Any], *options: str) -> list[str]:
    given = [word for key, value in table.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["train", *given, *options]


def of(table: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A run's losses, of training and of evaluation, and the weights of its last step."""
    folder = Path(table["output.runs_dir"]) / table["output.name"]
    told = [event["loss"] for event in events.read(folder / "events.jsonl") if event["event"] in ("step", "evaluation")]
    return told, load_file(folder / "checkpoints" / "step-000004" / "weights.safetensors")


@pytest.mark.slow
def test_two_processes_are_one_and_resume_what_one_began(settings: Settings, tmp_path: Path) -> None:
    """LoRA begins in two and ends in one, full finetuning the other way round; all weights and losses to 1e-6.

    Sums in another order differ by some 1e-7 of a gradient in float32, and AdamW's first steps pass on what a gradient
    is off relative to itself, times the learning rate.
    """
    common = settings(
        training__batch_rows=2, training__gradient_accumulation_steps=3, schedule__name="constant",
        evaluation__split=0.2, evaluation__every_steps=2, optimizer__learning_rate=1e-3, data__max_tokens=64,
        output__checkpoint_every_steps=2, output__keep_checkpoints=0,
    ) | {"schedule.warmup_steps": 0}  # fmt: skip
    full = {key: value for key, value in common.items() if not key.startswith("method.")} | {"method.name": "full"}
    lora = common | {"method.dropout": 0.0}
    ends = {}
    for name, table in (("lora", lora), ("full", full)):
        straight = table | {"output.name": f"{name}-straight", "training.max_steps": 4}
        train.run(RunConfig.from_toml(None, straight))
        ends[name] = of(straight)
    lora, full = (table | {"output.name": f"{name}-parts"} for name, table in (("lora", lora), ("full", full)))
    train.run(RunConfig.from_toml(None, full | {"training.max_steps": 2}))
    script, told = tmp_path / "twice.py", tmp_path / "words.json"
    script.write_text(TWICE)
    runs = [words(lora | {"training.max_steps": 2}), words(full | {"training.max_steps": 4}, "--resume", "--json")]
    told.write_text(json.dumps(runs))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(told)]
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", *launcher], stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = process.communicate(timeout=200)
    finally:
        process.terminate()  # ends what it has started, too
    assert process.returncode == 0, errors
    assert errors.count("lora-parts: done") == 1, "one of them speaks"
    assert json.loads(output)["steps"] == 4
    train.run(RunConfig.from_toml(None, lora | {"training.max_steps": 4}), resume=True)
    for name, table in (("lora", lora), ("full", full)):
        losses, weights = of(table)
        expected, reference = ends[name]
        assert losses == pytest.approx(expected, rel=1e-6)
        for key, weight in weights.items():
            torch.testing.assert_close(weight, reference[key], rtol=0, atol=1e-6)
        notices = [
            event["message"]
            for event in events.read(Path(table["output.runs_dir"]) / f"{name}-parts" / "events.jsonl")
            if event["event"] == "notice"
        ]
        assert any("resumed with another processes" in notice for notice in notices)


def test_a_step_is_dealt_out_whole_and_no_batch_grows() -> None:
    for portions in ([[1, 2, 3], [4, 5, 6], [7]], [[1, 2, 3, 4, 5, 6, 7]], [[5]]):
        for size in (1, 2, 3, 5):
            parts = [Processes(rank, size).part(portions) for rank in range(size)]
            assert sorted(row for part in parts for rows in part for row in rows) == sorted(
                row for rows in portions for row in rows
            )
            assert all(any(set(rows) <= set(portion) for portion in portions) for part in parts for rows in part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "training: expected a step of at least 3 batches, or batches of as many rows, for 3 processes, got 1 of 2",
        ),
        (
            {"training.batch_rows": 3, "training.optimizer_in_backward": True, "training.max_gradient_norm": 0.0},
            "training.optimizer_in_backward: expected one process, got 3",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused(settings: Settings, changes: dict[str, Any], message: str) -> None:
    config = RunConfig.from_toml(None, settings() | changes)
    Processes(0, 1).check(config)
    with pytest.raises(InputError, match=message):
        Processes(0, 3).check(config)


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    with Interruption(once_seconds=0.2) as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
