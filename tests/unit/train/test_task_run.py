"""Runs of several tasks: each has its share of the loss, however much of its data there is, and they resume exactly."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftkit import train
from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.train.planned import Shape
from ftkit.train.result import sha256_of

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tasks(count: int = 40, every: int = 4) -> list[dict[str, Any]]:
    """Sums, and every fourth row or so a spelling; with a name each."""
    dice = random.Random(3)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        a, b = dice.randrange(50), dice.randrange(50)
        if number % every:
            rows.append({"prompt": f"{a} + {b}?", "completion": f"It is {a + b}.", "task": "sums"})
        else:
            rows.append({"prompt": f"Spell {a}", "completion": "-".join(str(a)), "task": 7})
    return rows


def explained(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Is {n} odd?", "label": n % 2, "rationale": f"Half of {n} is {n / 2}, a number."}
        for n in range(count)
    ]


def events(table: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    path = Path(table["output.runs_dir"]) / table["output.name"] / "events.jsonl"
    return [event for event in map(json.loads, path.read_text().splitlines()) if event["event"] == kind]


def test_each_task_has_its_share(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", tasks(40, 2))
    table = settings(data__path=path, objective__name="mft", evaluation__split=0.3, training__batch_rows=4)
    result = train.run(RunConfig.from_toml(None, table | {"objective.weights": {"sums": 3.0}}))
    steps, held_out = events(table, "step"), events(table, "evaluation")
    both = [told for told in [*steps, *held_out] if 0 < told["metrics"]["weight_7"] < 1]
    assert len(both) > 10
    for told in both:
        assert told["metrics"]["weight_sums"] == pytest.approx(0.75, rel=1e-5)
        assert told["metrics"]["weight_7"] == pytest.approx(0.25, rel=1e-5)
        mean = 0.75 * told["metrics"]["loss_sums"] + 0.25 * told["metrics"]["loss_7"]
        assert told["loss"] == pytest.approx(mean, rel=1e-5)
    assert steps[-1]["loss"] < 0.97 * steps[0]["loss"]
    assert result.planned_peak_bytes is not None
    assert result.peak_bytes <= result.planned_peak_bytes <= 1.35 * result.peak_bytes


def test_a_step_that_lacks_a_task_is_told_of_once(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", tasks(12))
    train.run(RunConfig.from_toml(None, settings(data__path=path, objective__name="mft", training__batch_rows=1)))
    (warning,) = [event for event in events(settings(), "warning") if event["kind"] == "task_missing"]
    assert "expected rows of every task, got none of" in warning["message"]


def test_a_label_and_its_rationale_are_two_tasks(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", explained())
    table = settings(data__path=path, objective__name="step_by_step", objective__alpha=0.7, method__dropout=0.0)
    result = train.run(RunConfig.from_toml(None, table))
    for told in events(table, "step"):
        assert told["metrics"]["weight_label"] == pytest.approx(0.7, rel=1e-5)
        mean = 0.7 * told["metrics"]["loss_label"] + 0.3 * told["metrics"]["loss_rationale"]
        assert told["loss"] == pytest.approx(mean, rel=1e-5)
    assert result.planned_peak_bytes is not None
    assert result.peak_bytes <= result.planned_peak_bytes <= 1.35 * result.peak_bytes
    assert Shape.largest(RunConfig.from_toml(None, table)).lengths == (128,) * 4


@pytest.mark.parametrize("name", ["mft", "step_by_step"])
def test_accumulated_is_the_update_of_one_big_batch(settings: Settings, tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "rows.jsonl", tasks() if name == "mft" else explained())
    ends = []
    for rows, accumulated in ((4, 1), (1, 4)):
        table = settings(
            data__path=path, objective__name=name, training__batch_rows=rows, training__max_steps=3,
            training__gradient_accumulation_steps=accumulated, method__dropout=0.0, output__name=f"run-{rows}",
        )  # fmt: skip
        train.run(RunConfig.from_toml(None, table))
        ends.append([event["loss"] for event in events(table, "step")])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_convergence_is_followed_and_a_resumed_run_goes_on_with_it(settings: Settings, tmp_path: Path) -> None:
    """The same bytes and the same weights as the run that was never stopped."""
    path, held_out = (written(tmp_path / f"{name}.jsonl", tasks(24, 2)[:: -1 if name == "b" else 1]) for name in "ab")
    sums = {}
    for name, stops in (("whole", [7]), ("parts", [5, 7])):
        for number, steps in enumerate(stops):
            table = settings(
                data__path=path, evaluation__path=held_out, objective__name="mft", training__max_steps=steps,
                output__name=name, schedule__name="constant", training__batch_rows=4,
            )  # fmt: skip
            table |= {"objective.balance": "coba", "objective.warmup": 3, "objective.history": 5}
            train.run(RunConfig.from_toml(None, table), resume=number > 0)
        weights = [event["metrics"]["weight_sums"] for event in events(table, "step")]
        last = Path(table["output.runs_dir"]) / name / "checkpoints" / "step-000007" / "adapter"
        sums[name] = (sha256_of(last), weights)
    assert sums["whole"] == sums["parts"]
    assert sums["whole"][1][:2] == pytest.approx([0.5, 0.5], rel=1e-5)
    assert len(set(sums["whole"][1])) > 4


@pytest.mark.parametrize(
    ("objective", "rows", "more", "message"),
    [
        ("mft", [{"text": "a b"}], {}, "expected a column task"),
        ("mft", [{"text": "a b", "task": " "}], {}, "task: expected a name, got an empty one"),
        ("mft", [{"text": f"a {n}", "task": n} for n in range(300)], {}, "expected at most 256 names, got another"),
        ("mft", tasks(8), {"objective.weights": {"sum": 1.0}}, r"expected tasks of the data \(7, sums\), got 'sum'"),
        ("mft", tasks(8), {"objective.balance": "coba"}, "expected held-out rows of every task, got none of 7, sums"),
        ("mft", explained(4), {}, "expected a column task"),
        ("sft", explained(4), {}, "expected one answer a row, got 4 labels with a rationale"),
        ("dpo", explained(4), {}, "expected pairs of a chosen and a rejected answer a row, got 4 other rows"),
        ("step_by_step", tasks(8), {}, "expected a label and a rationale a row, got 8 other rows"),
        ("step_by_step", [{"prompt": "a", "label": [], "rationale": "b"}], {}, "label: expected text or a number"),
    ],
)  # fmt: skip
def test_rows_that_an_objective_cannot_use_are_refused(
    settings: Settings, tmp_path: Path, objective: str, rows: list[Any], more: dict[str, Any], message: str
) -> None:
    table = settings(data__path=written(tmp_path / "rows.jsonl", rows), objective__name=objective) | more
    with pytest.raises(InputError, match=message):
        train.run(RunConfig.from_toml(None, table))


def test_a_held_out_file_has_no_tasks_of_its_own(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", tasks(8))
    held_out = written(tmp_path / "held-out.jsonl", [{"text": "a", "task": "other"}])
    table = settings(data__path=path, evaluation__path=held_out, objective__name="mft")
    with pytest.raises(InputError, match=r"evaluation: expected tasks that are trained on \(7, sums\), got 'other'"):
        train.run(RunConfig.from_toml(None, table))
