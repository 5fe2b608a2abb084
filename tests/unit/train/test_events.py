"""events.jsonl survives crashes, numbers that JSON has not, and being wound back to a checkpoint."""

import json
import math
from pathlib import Path

import pytest

from ftkit.train.events import Events, read, rewind

pytestmark = pytest.mark.unit


def test_every_event_is_on_disk_before_its_listeners_hear_of_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    seen = []
    events = Events(path, [lambda event: seen.append((event, read(path)[-1]))])
    events.emit("step", 1, loss=0.1 + 0.2)
    events.emit("step", 2, loss=math.nan, metrics={"kl": math.inf, "reward_margin": 0.5})
    assert [given for given, _ in seen] == [stored for _, stored in seen]
    assert [given["loss"] for given, _ in seen] == [0.1 + 0.2, None]
    assert seen[1][0]["metrics"] == {"kl": None, "reward_margin": 0.5}
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n{"event": "step", "ste\xff')
    assert [event["step"] for event in read(path)] == [1]


def test_winding_back_keeps_what_was_before_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = Events(path, [])
    events.emit("started", 0)
    for step in range(1, 6):
        events.emit("step", step, loss=step / 3)
    events.emit("interrupted", 3)
    events.close()
    assert [(event["event"], event["step"]) for event in rewind(path, 3)] == [
        ("started", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
    ]
    assert [event["step"] for event in read(path)] == [0, 1, 2, 3]
    assert rewind(tmp_path / "none", 3) == []
    assert rewind(path, 0) == read(path) == []
