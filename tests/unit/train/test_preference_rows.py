"""Rows that are pairs of a chosen and a rejected answer: never trained on by an objective that takes one answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftkit import train
from ftkit.config import RunConfig
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Question {n}", "chosen": "Good.", "rejected": "Bad."} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rejected_answers_are_not_learnt(settings: Settings, pairs: Path) -> None:
    with pytest.raises(InputError, match="expected one answer a row, got 6 pairs") as error:
        train.run(RunConfig.from_toml(None, settings(data__path=str(pairs))))
    assert "completion" in str(error.value.hint)


def test_chosen_answers_alone_are_learnt_when_asked_for(settings: Settings, pairs: Path) -> None:
    chosen = settings(data__path=str(pairs), data__columns={"completion": "chosen"}, training__max_steps=2)
    assert train.run(RunConfig.from_toml(None, chosen)).steps == 2
