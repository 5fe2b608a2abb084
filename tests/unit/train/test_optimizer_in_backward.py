"""An update in the backward pass is the update after it, bit for bit, with one gradient in memory at a time."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftkit import plugins, train
from ftkit.config import Choice, RunConfig
from ftkit.errors import InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import LossParts
from ftkit.optim import build
from ftkit.train import events
from ftkit.train.step import gradients, step_in_backward

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]


def full(settings: Settings, name: str, optimizer: str, in_backward: bool, **changes: Any) -> dict[str, Any]:
    table = settings(
        output__name=name,
        optimizer__name=optimizer,
        optimizer__learning_rate=1e-3,
        training__max_gradient_norm=0.0,
        training__optimizer_in_backward=in_backward,
        training__max_steps=4,
        training__batch_rows=1,
        data__max_tokens=48,  # few activations, so that gradients decide the peak
        **changes,
    )
    return {key: value for key, value in table.items() if not key.startswith("method.")} | {"method.name": "full"}


def run(table: dict[str, Any]) -> train.TrainResult:
    return train.run(RunConfig.from_toml(None, table))


@pytest.mark.parametrize("optimizer", plugins.names("optim"))
def test_full_finetuning_ends_in_the_same_bits_and_takes_less_memory(settings: Settings, optimizer: str) -> None:
    after = run(full(settings, "after", optimizer, False))
    during = run(full(settings, "during", optimizer, True))
    assert (during.adapter_sha256, during.final_loss) == (after.adapter_sha256, after.final_loss)
    assert during.bad_steps == 0
    for result in (after, during):
        assert result.planned_peak_bytes is not None
        assert result.peak_bytes <= result.planned_peak_bytes <= 1.35 * result.peak_bytes
    assert during.peak_bytes < after.peak_bytes
    assert during.planned_peak_bytes < after.planned_peak_bytes  # type: ignore[operator]


def test_with_checkpointed_activations_and_after_a_resume_as_well(settings: Settings) -> None:
    changes: dict[str, Any] = {"training__activation_checkpointing": True, "output__checkpoint_every_steps": 2}
    straight = run(full(settings, "straight", "adamw", False, **changes))
    table = full(settings, "stopped", "adamw", True, **changes)
    run(table | {"training.max_steps": 2, "schedule.name": "constant", "schedule.warmup_steps": 0})
    resumed = train.run(
        RunConfig.from_toml(None, table | {"schedule.name": "constant", "schedule.warmup_steps": 0}), resume=True
    )
    again = run(
        full(settings, "again", "adamw", False, **changes) | {"schedule.name": "constant", "schedule.warmup_steps": 0}
    )
    assert resumed.adapter_sha256 == again.adapter_sha256
    assert run(full(settings, "other", "adamw", True, **changes)).adapter_sha256 == straight.adapter_sha256


def test_the_norm_is_told_and_lora_works_too(settings: Settings) -> None:
    def norms(name: str, in_backward: bool) -> list[float]:
        table = settings(
            output__name=name, training__max_gradient_norm=0.0, training__optimizer_in_backward=in_backward
        )
        run(table)
        path = Path(table["output.runs_dir"]) / name / "events.jsonl"
        return [event["gradient_norm"] for event in events.read(path) if event["event"] == "step"]

    assert norms("during", True) == pytest.approx(norms("after", False), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "max_gradient_norm: expected 0 with optimizer_in_backward, got 1.0"),
        (
            {"training.max_gradient_norm": 0.0, "training.gradient_accumulation_steps": 2},
            "gradient_accumulation_steps: expected 1 with optimizer_in_backward, got 2",
        ),
    ],
)
def test_what_needs_all_gradients_is_refused_with_a_hint(
    settings: Settings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        RunConfig.from_toml(None, settings(training__optimizer_in_backward=True) | changes)
    assert "batch_rows" in str(error.value) or "training.max_gradient_norm=0" in str(error.value)


def tables() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.nn.Parameter(torch.randn(11, 5, generator=generator)) for name in ("inside", "outside")}


def loss_of(weights: dict[str, torch.nn.Parameter], batch: RaggedBatch, factor: float = 1.0) -> LossParts:
    assert batch.targets is not None
    kept = batch.targets != -100
    logits = weights["inside"][batch.tokens[kept].long()] @ weights["outside"].T
    total = torch.nn.functional.cross_entropy(logits, batch.targets[kept].long(), reduction="sum") * factor
    return LossParts(sum=total[None], count=kept.sum()[None].double())


BATCH = RaggedBatch.pack([[1, 2, 3, 4, 5], [7, 8]], targets=[[-100, 3, 4, 5, 6], [8, 9]])
NOTHING = RaggedBatch.pack([[1, 2]], targets=[[-100, -100]])


def test_gradients_are_divided_by_the_count_and_freed_one_by_one() -> None:
    ours, theirs = tables(), tables()
    optimizer, oracle = (build(Choice(name="adafactor"), weights) for weights in (ours, theirs))
    alive = []
    update = optimizer.update

    def watched(name: str, factor: float) -> None:
        alive.append(sum(weight.grad is not None for weight in ours.values()))
        update(name, factor)

    optimizer.update = watched  # type: ignore[method-assign]
    for _ in range(3):
        outcome = step_in_backward(lambda batch: loss_of(ours, batch), ours, BATCH, optimizer, 0.5)
        expected = gradients(lambda batch: loss_of(theirs, batch), theirs, [BATCH], 0.0)
        oracle.step(0.5)
        for weight in theirs.values():
            weight.grad = None
        assert (outcome.loss, outcome.tokens, outcome.trained) == (expected.loss, 7, 6)
        assert outcome.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert alive == [1] * 6
    assert all(weight.grad is None for weight in ours.values())
    loss_of(ours, BATCH).sum.sum().backward()  # no hook is left
    assert all(weight.grad is not None for weight in ours.values())


@pytest.mark.parametrize(("factor", "batch"), [(float("nan"), BATCH), (float("inf"), BATCH), (1.0, NOTHING)])
def test_a_step_without_a_usable_loss_changes_nothing(factor: float, batch: RaggedBatch) -> None:
    weights, before = tables(), tables()
    optimizer = build(Choice(name="adamw"), weights)
    outcome = step_in_backward(lambda batch: loss_of(weights, batch, factor), weights, batch, optimizer, 1.0)
    assert not math.isfinite(outcome.loss)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert int(optimizer.state()["steps"]) == 0


def test_a_gradient_that_is_not_finite_touches_no_weight_and_is_told() -> None:
    weights, before = tables(), tables()
    optimizer = build(Choice(name="adamw"), weights)
    weights["inside"].register_hook(lambda gradient: gradient * float("inf"))
    outcome = step_in_backward(lambda batch: loss_of(weights, batch), weights, BATCH, optimizer, 1.0)
    assert math.isfinite(outcome.loss)
    assert not math.isfinite(outcome.gradient_norm)
    assert torch.equal(weights["inside"], before["inside"])
    assert bool(weights["outside"].isfinite().all())
    assert not torch.equal(weights["outside"], before["outside"])
