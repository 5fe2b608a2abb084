"""Training with products in 8 bits: close to the exact run, watched over, resumed to the bit, and planned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftkit import train
from ftkit.config import RunConfig
from ftkit.errors import InputError, Interrupted
from ftkit.nn.eight_bits import EightBitProducts
from ftkit.nn.linear import DenseWeight
from ftkit.train import events, rounding
from ftkit.train.step import StepOutcome

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]


def run(settings: dict[str, Any], **options: bool) -> train.TrainResult:
    return train.run(RunConfig.from_toml(None, settings), **options)


def told(settings: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    path = Path(settings["output.runs_dir"]) / settings["output.name"] / "events.jsonl"
    return [event for event in events.read(path) if event["event"] == kind]


def test_products_are_rounded_in_training_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x, dy = (torch.randn(*shape, generator=generator) for shape in ((64, 96), (7, 96), (7, 64)))
    weight = EightBitProducts(DenseWeight(w))
    x.requires_grad_()
    y = weight.train().matmul(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    for found, exact in ((y, x @ w.T), (dx, dy @ w)):
        error = float(((found - exact).norm() / exact.norm()).detach())
        assert 1e-4 < error < 0.02
    assert weight.stored() is None
    assert torch.equal(weight.eval().matmul(x), DenseWeight(w).matmul(x))
    assert weight.stored() is not None
    weight.train().exact = True
    assert torch.equal(weight.matmul_transposed(dy), DenseWeight(w).matmul_transposed(dy))


@pytest.mark.parametrize(("trained", "trusted"), [(64, True), (16, True), (512, False), (5000, False)])
def test_the_loss_of_few_targets_may_differ_by_more(trained: int, trusted: bool) -> None:
    losses = iter([1.02, 1.0])

    def make() -> StepOutcome:
        return StepOutcome(
            loss=next(losses), gradient_norm=1.0, tokens=trained, trained=float(trained), trained_tokens=trained
        )

    _, warning = rounding.compared([], {}, make, 1)
    assert (warning is None) == trusted


def test_a_run_learns_what_the_exact_one_learns(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "FIRST", 1)
    monkeypatch.setattr(rounding, "EVERY", 7)
    chosen = settings(training__precision="int8", evaluation__split=0.2, training__max_steps=20)
    result = run(chosen)
    exact = settings(output__name="exact", evaluation__split=0.2, training__max_steps=20)
    reference = run(exact)
    assert not told(chosen, "warning")
    assert result.adapter_sha256 != reference.adapter_sha256
    assert result.eval_loss == pytest.approx(reference.eval_loss, rel=0.01)
    assert result.peak_bytes <= result.planned_peak_bytes


def test_where_gradients_differ_the_run_goes_on_exactly(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "LEAST_COSINE", 1.1)
    chosen = settings(training__precision="int8", training__max_steps=6)
    found = run(chosen)
    (warning,) = told(chosen, "warning")
    assert warning["kind"] == "rounding"
    assert "cosine of at least 1.1" in warning["message"]
    reference = run(settings(output__name="exact", training__max_steps=6))
    assert found.adapter_sha256 == reference.adapter_sha256


def test_a_resumed_run_has_the_same_bits(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "FIRST", 1)
    monkeypatch.setattr(rounding, "EVERY", 4)
    straight = settings(training__precision="int8", output__name="straight", training__max_steps=9)
    expected = run(straight).adapter_sha256
    chosen = settings(training__precision="int8", training__max_steps=9)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train.run(RunConfig.from_toml(None, chosen), stop)
    result = train.run(train.resumed_config(None, chosen), resume=True)
    assert result.adapter_sha256 == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__dtype": "bfloat16"}, "expected float32 on the CPU with int8, got torch.bfloat16"),
        (
            {"training__optimizer_in_backward": True, "training__max_gradient_norm": 0.0},
            "expected dtype with optimizer_in_backward",
        ),
        ({"training__precision": "int4"}, "training.precision: expected"),
    ],
)
def test_what_cannot_be_is_said(settings: Settings, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(settings(**{"training__precision": "int8"} | changes))
