"""A run on preferences: it learns which answer is better, shows that live, and warns of what goes wrong."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ftkit import train
from ftkit.cli import application
from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.train.planned import Shape
from ftkit.train.watchdog import Preferences

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]
NAMES = ["dpo", "lc_dpo", "ipo", "simpo", "cpo", "orpo", "kto"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 sums, rightly answered in the chosen answer."""
    dice = random.Random(2)
    rows = []
    for _ in range(48):
        a, b = dice.randrange(50), dice.randrange(50)
        rows.append({"prompt": f"{a} + {b}?", "chosen": f"It is {a + b}.", "rejected": f"Is {a} odd?"})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def events(table: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    path = Path(table["output.runs_dir"]) / "run" / "events.jsonl"
    return [event for event in map(json.loads, path.read_text().splitlines()) if event["event"] == kind]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_which_answer_is_better(settings: Settings, pairs: Path, name: str) -> None:
    table = settings(data__path=str(pairs), objective__name=name, evaluation__split=0.2, method__dropout=0.0)
    result = train.run(RunConfig.from_toml(None, table))
    steps, held_out = events(table, "step"), events(table, "evaluation")
    first, last = steps[0]["metrics"], steps[-1]["metrics"]
    assert last["reward_accuracy"] == 1
    assert last["reward_margin"] > first["reward_margin"]
    assert held_out[-1]["metrics"]["reward_accuracy"] == 1
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert all(step["trained_tokens"] > 20 for step in steps)
    assert result.trained_tokens == sum(step["trained_tokens"] for step in steps)
    assert result.planned_peak_bytes is not None
    assert result.peak_bytes <= result.planned_peak_bytes <= 1.35 * result.peak_bytes
    if name in ("dpo", "lc_dpo", "ipo"):
        assert (first["kl"], last["kl"] > 0.01) == (0, True)
    if name in ("dpo", "lc_dpo", "ipo", "kto"):
        assert 0 == first["chosen_log_ratio"] == first["rejected_log_ratio"] > last["rejected_log_ratio"]
    report = Path(result.report).read_text()
    for metric in last:
        assert f"<figcaption>{metric.replace('_', ' ')}" in report


def test_the_command_shows_it_live(settings: Settings, pairs: Path) -> None:
    words = [f"{key}={json.dumps(value)}" for key, value in settings(data__path=str(pairs)).items()]
    given = [word for each in words for word in ("--set", each)]
    result = CliRunner().invoke(application(), ["train", "--objective", "dpo", *given], catch_exceptions=False)
    assert result.exit_code == 0
    assert "reward accuracy" in result.stderr
    assert "reward margin" in result.stderr


def test_a_plan_has_room_for_two_answers_of_full_length(settings: Settings) -> None:
    shapes = [
        Shape.largest(RunConfig.from_toml(None, settings(objective__name=name, data__max_tokens=64)))
        for name in ("sft", "dpo", "kto")
    ]
    assert [shape.lengths for shape in shapes] == [(64,) * 2, (64,) * 4, (64,) * 16]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_accumulated_is_the_update_of_one_big_batch(settings: Settings, pairs: Path, name: str) -> None:
    ends = []
    for rows, accumulated in ((4, 1), (1, 4)):
        table = settings(
            data__path=str(pairs), objective__name=name, training__batch_rows=rows, training__max_steps=2,
            training__gradient_accumulation_steps=accumulated, method__dropout=0.0, output__name=f"run-{rows}",
        )  # fmt: skip
        result = train.run(RunConfig.from_toml(None, table))
        ends.append((result.final_loss, result.trained_tokens))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    assert ends[0][1] == ends[1][1]


def test_rows_that_are_no_pairs_are_refused(settings: Settings) -> None:
    with pytest.raises(InputError, match="expected pairs of a chosen and a rejected answer a row, got 48 other rows"):
        train.run(RunConfig.from_toml(None, settings(objective__name="dpo")))


def labelled(folder: Path, labels: list[Any]) -> Path:
    """Sums with an answer each that is right or wrong, and what is said of it."""
    path = folder / "labelled.jsonl"
    said = [(f"It is {n + n}.", True) if n % 3 else (f"Is {n} odd?", False) for n in range(len(labels))]
    rows = [
        {"prompt": f"{n} + {n}?", "completion": answer, "label": wanted if label is None else label}
        for n, ((answer, wanted), label) in enumerate(zip(said, labels, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_single_answers_are_learnt_from_by_their_labels(settings: Settings, tmp_path: Path) -> None:
    path = labelled(tmp_path, [None] * 30)
    table = settings(data__path=str(path), objective__name="kto", method__dropout=0.0)
    train.run(RunConfig.from_toml(None, table))
    first, last = (events(table, "step")[at]["metrics"] for at in (0, -1))
    assert last["reward_accuracy"] > 0.9
    assert last["chosen_log_ratio"] - last["rejected_log_ratio"] > 1
    assert first["chosen_tokens"] > 0
    one_pass = train.run(RunConfig.from_toml(None, table | {"training.max_steps": 2, "output.name": "one-pass"}))
    assert one_pass.planned_peak_bytes is not None
    assert one_pass.peak_bytes <= one_pass.planned_peak_bytes <= 1.35 * one_pass.peak_bytes


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("kto", [True], "data: expected at least 2 rows, of which one's answer is held against the other's, got 1"),
        ("kto", ["good", "bad"], "expected pairs of a chosen and a rejected answer a row, or an answer with its label"),
        ("dpo", [True, False], "expected pairs of a chosen and a rejected answer a row, got 2 other rows"),
        ("sft", [True, False], "expected answers to learn, got 2 that are labelled as wanted or not"),
    ],
)
def test_answers_that_an_objective_cannot_use_are_refused(
    settings: Settings, tmp_path: Path, name: str, labels: list[Any], message: str
) -> None:
    table = settings(data__path=str(labelled(tmp_path, labels)), objective__name=name)
    with pytest.raises(InputError, match=message):
        train.run(RunConfig.from_toml(None, table))


def test_labelled_answers_are_all_learnt_when_asked_for(settings: Settings, tmp_path: Path) -> None:
    path = labelled(tmp_path, [True, False])
    table = settings(data__path=str(path), data__schema="prompt_completion", training__max_steps=1)
    assert train.run(RunConfig.from_toml(None, table)).steps == 1


def test_a_method_that_edits_the_base_is_refused_before_anything_is_written(settings: Settings, pairs: Path) -> None:
    table = settings(data__path=str(pairs), objective__name="dpo", method__name="full")
    table = {key: value for key, value in table.items() if key not in ("method.rank", "method.dropout")}
    with pytest.raises(InputError, match="dpo: expected a method that leaves the base as it is"):
        train.run(RunConfig.from_toml(None, table))
    assert not Path(table["output.runs_dir"]).exists()


def test_long_chosen_answers_and_a_high_rate_are_told(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": f"Question {n}", "chosen": "Good. " * 5, "rejected": "Bad."} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = settings(data__path=str(path), objective__name="simpo", method__name="full", training__max_steps=1)
    table = {key: value for key, value in table.items() if key not in ("method.rank", "method.dropout")}
    train.run(RunConfig.from_toml(None, table))
    told = " ".join(event["message"] for event in events(table, "notice"))
    assert "chosen answers are 6.20 times as long as rejected ones" in told
    assert "optimizer.learning_rate: 0.01 is much for preferences" in told


def test_preferences_that_go_wrong_are_told_once() -> None:
    good = {"reward_accuracy": 1.0, "chosen_log_ratio": 0.1}
    falling = {"reward_accuracy": 1.0, "chosen_log_ratio": -0.1}
    watch = Preferences()
    assert not any(watch.watch(step, 0.5, 0.3, falling) for step in range(49))
    assert not watch.watch(49, 0.5, 0.3, good)
    assert not any(watch.watch(step, 0.5, 0.3, falling) for step in range(50, 99))
    (warning,) = watch.watch(99, 0.5, 0.3, falling)
    assert (warning.kind, "for 50 steps" in warning.message) == ("chosen_falls", True)
    assert not watch.watch(100, 0.5, 0.3, falling)
    assert not watch.watch(101, 0.2, 0.001, good)
    (warning,) = watch.watch(102, 0.19, 0.009, good)
    assert (warning.kind, "19%" in warning.message) == ("loss_gone", True)
    assert not watch.watch(103, 0.19, 0.009, good)
    assert not Preferences().watch(1, 0.1, 0.001, {})
