"""Feedback that a server kept is rows to train on: pairs, labels, and answers that were rated up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftkit import train
from ftkit.config import RunConfig
from ftkit.data import feedback
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

ASKED = [{"role": "user", "content": "2 + 2?"}]
OTHER = [{"role": "user", "content": "3 + 3?"}]
KEPT: list[dict[str, Any]] = [
    {"prompt": ASKED, "chosen": "4", "rejected": "5", "adapter": "aa", "id": "x"},
    {"prompt": OTHER, "completion": "6", "label": True, "adapter": None},
    {"prompt": OTHER, "completion": "7", "label": False},
    {"prompt": OTHER, "completion": "8", "label": False},
    {"prompt": "A text", "completion": " goes on", "label": True},
]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state" / "feedback").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in KEPT)
    (tmp_path / "state" / "feedback" / "feedback.jsonl").write_text(lines + '{"prompt": "cut o')
    return tmp_path / "state"


def rows(state: Path, **how: Any) -> list[dict[str, Any]]:
    text = Path(feedback.rows_file(f"feedback:{state}", **how)).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_each_objective_gets_its_rows(state: Path) -> None:
    pair = {"prompt": ASKED, "chosen": "4", "rejected": "5"}
    assert rows(state, pairs=True, labelled=False) == [pair, {"prompt": OTHER, "chosen": "6", "rejected": "7"}]
    assert rows(state, pairs=True, labelled=True) == [
        {"prompt": ASKED, "completion": "4", "label": True},
        {"prompt": ASKED, "completion": "5", "label": False},
        *({key: row[key] for key in ("prompt", "completion", "label")} for row in KEPT[1:]),
    ]
    assert rows(state, pairs=False, labelled=False) == [
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": "4"}]},
        {"prompt": OTHER, "completion": [{"role": "assistant", "content": "6"}]},
        {"prompt": "A text", "completion": " goes on"},
    ]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_training_takes_feedback(state: Path, settings: Callable[..., dict[str, Any]], objective: str) -> None:
    changes = {"objective.name": objective, "data.path": f"feedback:{state}", "training.max_steps": 2}
    result = train.run(RunConfig.from_toml(None, settings() | changes))
    assert result.steps == 2
    assert result.final_loss is not None
    stored = (Path(result.adapter).parent / "config.toml").read_text()
    assert f"feedback:{state}" in stored


def test_feedback_that_is_not_there_is_told(tmp_path: Path, state: Path) -> None:
    with pytest.raises(InputError, match="expected feedback, got none at"):
        feedback.rows_file(f"feedback:{tmp_path}", pairs=True, labelled=False)
    path = state / "feedback" / "feedback.jsonl"
    path.write_text(json.dumps(KEPT[1]) + "\n")
    with pytest.raises(InputError, match="expected preferred answers"):
        feedback.rows_file(f"feedback:{state}", pairs=True, labelled=False)
    path.write_text("[]\n")
    with pytest.raises(InputError, match=r"feedback\.jsonl:1: expected a row of feedback"):
        feedback.rows_file(f"feedback:{state}", pairs=True, labelled=False)
