"""On the real model: a killed run continues to the same adapter, and what it learned is in the loss."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ftkit import train
from ftkit.config import RunConfig
from ftkit.train import events

pytestmark = [pytest.mark.model, pytest.mark.slow]

STEPS = 5


def test_killed_and_resumed_gives_the_same_bits(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "chats.jsonl"
    facts = [("Who keeps the lamp of Orrin Bay?", "Tamsin Vell keeps the lamp."), ("What is it lit with?", "Fish oil.")]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in facts * 6]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model.source": str(smollm2),
        "data.path": str(data),
        "data.max_tokens": 96,
        "method.dropout": 0.05,
        "optimizer.learning_rate": 2e-3,
        "training.max_steps": STEPS,
        "training.threads": 1,
        "output.runs_dir": str(tmp_path / "runs"),
        "output.checkpoint_every_steps": 2,
        "output.samples": 0,
    }
    straight = train.run(RunConfig.from_toml(None, settings | {"output.name": "straight"}))
    killed = settings | {"output.name": "killed"}
    given = [word for key, value in killed.items() for word in ("--set", f"{key}={value}")]
    process = subprocess.Popen([sys.executable, "-m", "ftkit", "train", *given], stderr=subprocess.DEVNULL)
    story = tmp_path / "runs" / "killed" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and sum(e["event"] == "step" for e in events.read(story)) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = train.run(train.resumed_config(None, killed), resume=True)
    assert resumed.adapter_sha256 == straight.adapter_sha256

    def losses(name: str) -> list[float]:
        found = events.read(tmp_path / "runs" / name / "events.jsonl")
        return [event["loss"] for event in found if event["event"] == "step"]

    assert losses("killed") == losses("straight")
    assert losses("straight")[-1] < 0.7 * losses("straight")[0]
    assert any(event["event"] == "resumed" for event in events.read(story))
