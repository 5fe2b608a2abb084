"""Runs whose layers leave tokens out: plans from above, the same bits after a resume, and what is refused."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.train.conftest import conversation, write_rows

from ftkit import train
from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.nn.blocks import Blocks
from ftkit.train import sparse_shapes, sparse_tokens

pytestmark = pytest.mark.unit

Make = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictors learn from a few batches, which is enough to be told apart."""
    monkeypatch.setattr(sparse_tokens, "BATCHES", 3)


@pytest.fixture
def long(settings: Make, tmp_path: Path) -> Make:
    """Settings of a run over questions of 100 to 900 letters with short answers, some of several turns."""
    dice = random.Random(3)

    def question() -> str:
        return "".join(dice.choice("abcdefgh ") for _ in range(dice.randrange(100, 900)))

    rows = [conversation(question(), dice.choice("xyz") * 3) for _ in range(12)]
    for row in rows[::4]:
        row["messages"] += conversation(question()[:300], "zzz")["messages"]
    path = write_rows(tmp_path / "long.jsonl", rows)

    def make(**changes: Any) -> dict[str, Any]:
        return settings(**{"data__path": str(path), "data__max_tokens": 1500, "training__sparse_tokens": 0.3} | changes)

    return make


def run(table: dict[str, Any], **options: bool) -> tuple[train.TrainResult, list[dict[str, Any]]]:
    heard: list[dict[str, Any]] = []
    return train.run(RunConfig.from_toml(None, table), heard.append, **options), heard


@pytest.mark.parametrize(
    "changes",
    [
        {"model__quant": "nf4", "training__activation_checkpointing": True},
        {"training__batch_rows": 2, "training__gradient_accumulation_steps": 2, "evaluation__split": 0.2},
        {"method__name": "full", "training__optimizer_in_backward": True, "training__max_gradient_norm": 0.0},
        {"model__dtype": "bfloat16", "objective__name": "distill"},
    ],
    ids=str,
)
def test_the_plan_bounds_the_run(long: Make, changes: dict[str, Any]) -> None:
    table = long(**changes)
    if changes.get("method__name") == "full":
        table = {key: value for key, value in table.items() if not key.startswith("method.") or key == "method.name"}
    result, _ = run(table | {"training.max_steps": 2})
    assert result.peak_bytes <= result.planned_peak_bytes
    dense, _ = run(table | {"training.max_steps": 1, "training.sparse_tokens": 1.0, "output.name": "dense"})
    assert result.planned_peak_bytes < dense.peak_bytes


def test_a_run_that_goes_on_ends_in_the_same_bits(long: Make) -> None:
    steady: dict[str, Any] = {"schedule__name": "constant", "output__checkpoint_every_steps": 3}
    constant = {"schedule.warmup_steps": 0}
    whole, heard = run(long(training__max_steps=6, output__name="whole", **steady) | constant)
    assert any("predictors find" in event.get("message", "") for event in heard)
    half = long(training__max_steps=3, output__name="half", **steady) | constant
    before, _ = run(half)
    after, heard = run(half | {"training.max_steps": 6}, resume=True)
    assert after.adapter_sha256 == whole.adapter_sha256 != before.adapter_sha256
    assert not any("predictors find" in event.get("message", "") for event in heard)
    folder = Path(half["output.runs_dir"]) / "half" / "sparse-tokens"
    (folder / "predictors.safetensors").write_bytes(b"lost")
    with pytest.raises(InputError, match="expected the predictors of this run"):
        run(half | {"training.max_steps": 7}, resume=True)


def test_recomputed_layers_and_batches_in_parts_give_the_same_update(long: Make) -> None:
    plain, _ = run(long(training__max_steps=3))
    recomputed, _ = run(long(training__max_steps=3, training__activation_checkpointing=True, output__name="again"))
    assert recomputed.adapter_sha256 == plain.adapter_sha256
    assert recomputed.peak_bytes < plain.peak_bytes


def test_what_comes_out_is_an_ordinary_adapter_and_evaluation_is_dense(long: Make) -> None:
    table = long(training__max_steps=2, evaluation__split=0.3)
    sparse, _ = run(table)
    dense, _ = run(table | {"training.sparse_tokens": 1.0, "output.name": "dense"})
    losses = [
        [event["loss"] for event in train.events.read(Path(table["output.runs_dir"]) / name / "events.jsonl")
         if event["event"] == "evaluation"]
        for name in (table["output.name"], "dense")
    ]  # fmt: skip
    assert losses[0][0] == losses[1][0]  # of the base
    files = [sorted(path.name for path in Path(result.adapter).iterdir()) for result in (sparse, dense)]
    assert files[0] == files[1]


def test_it_is_said_where_nothing_is_left_out(long: Make) -> None:
    _, heard = run(long(training__max_steps=1, data__train_on="all"))
    assert any("nothing is left out" in event.get("message", "") for event in heard)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__name": "dpo"}, "answers that are compared"),
        ({"training__precision": "int8"}, "training.precision"),
        ({"training__sparse_tokens": 0.0}, "above 0"),
        ({"training__sparse_tokens": 1.5}, "at most 1"),
    ],
    ids=str,
)
def test_what_cannot_be_combined_is_refused(long: Make, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    if "objective__name" in changes:
        pairs = [{"prompt": "a" * 300, "chosen": "x", "rejected": "y"}] * 4
        changes = changes | {"data__path": str(write_rows(tmp_path / "pairs.jsonl", pairs))}
    with pytest.raises(InputError, match=words):
        run(long(**changes))


def test_a_batch_that_is_made_up_keeps_no_less_than_the_one_that_it_stands_for() -> None:
    dice = random.Random(5)
    for _ in range(50):
        lengths = [dice.randrange(1, 900) for _ in range(dice.randrange(1, 5))]
        places = sorted(dice.sample(range(sum(lengths)), dice.randrange(1, min(60, sum(lengths)) + 1)))
        blocks = Blocks.of(lengths, places, 0.3)
        made = sparse_shapes.trained_places(lengths, blocks.kept, 0.3, len(places))
        assert len(made) == len(places)
        kept = Blocks.of(lengths, made, 0.3).kept
        assert all(ours >= theirs for ours, theirs in zip(kept, blocks.kept, strict=True))
