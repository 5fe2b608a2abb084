"""Losses of several tasks: the means of MFTCoder over padded rows, and CoBa's shares, both computed the long way."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from preferences import Answer, answers, logps, packed, random_model
from torch import Tensor

from ftkit import plugins
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import _coba, mft, step_by_step

pytestmark = pytest.mark.unit

NAMES = ("a", "b", "c")


def task_of(given: list[Answer], seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(3, (len(given),), generator=generator).tolist()
    found[:3] = [0, 1, 2]
    return found


def batches(given: list[Answer], task: list[int], parts: int) -> list[RaggedBatch]:
    """The answers in as many batches, of unequal size."""
    cuts = [round(len(given) * (part / parts) ** 1.5) for part in range(parts + 1)]
    return [packed(given[a:b], task=task[a:b]) for a, b in itertools.pairwise(cuts) if b > a]


def theirs(table: Tensor, given: list[Answer], task: list[int], config: mft.Config) -> Tensor:
    """MFTCoder's modes: over all, or tasks apart, by tokens or by rows; with factors of tasks."""
    losses = [-one for one in logps(table, given)]
    factor = [config.weights.get(name, 1.0) for name in NAMES]
    if config.by == "rows":
        losses = [one.mean().view(1) for one in losses]
    if config.balance == "none":
        weighted = sum(factor[k] * one.sum() for k, one in zip(task, losses, strict=True))
        return weighted / sum(factor[k] * len(one) for k, one in zip(task, losses, strict=True))  # type: ignore[return-value]
    total, present = table.new_zeros(()), 0.0
    for k in sorted(set(task)):
        total = total + factor[k] * torch.cat([one for one, of in zip(losses, task, strict=True) if of == k]).mean()
        present += factor[k]
    return total / present


CASES: dict[str, dict[str, Any]] = {
    "tokens": {"balance": "none"},
    "rows": {"balance": "none", "by": "rows"},
    "tasks": {},
    "tasks by rows": {"by": "rows"},
    "weights": {"weights": {"b": 0.3, "c": 2.5}},
    "weighted tokens": {"balance": "none", "weights": {"b": 0.3}},
    "one left out": {"weights": {"a": 0.0}},
}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_all_rows_at_once(case: str, parts: int) -> None:
    config = mft.Config(**CASES[case])
    for seed in range(3):
        model, given = random_model(seed), answers(6, seed)
        task = task_of(given, seed)
        total = torch.zeros((), dtype=torch.float64)
        count = 0.0
        for batch in mft.balanced(batches(given, task, parts), config, NAMES):
            found = mft.loss(model, batch, config, NAMES)
            total = total + found.sum.sum()
            count += float(found.count.sum())
        assert count == pytest.approx(1, rel=1e-6)
        expected = theirs(model.table, given, task, config)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-7)  # weights are f32
        ours, reference = (torch.autograd.grad(value, model.table)[0] for value in (total, expected))
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_more_of_a_task_changes_nothing() -> None:
    model, given = random_model(), answers(6)
    task = task_of(given)
    again = [one for one, k in zip(given, task, strict=True) if k == 1]
    for balance, same in (("tasks", True), ("none", False)):
        config = mft.Config(balance=balance)  # type: ignore[arg-type]
        sums = []
        for rows, of in ((given, task), ([*given, *again], [*task, *([1] * len(again))])):
            (batch,) = mft.balanced([packed(rows, task=of)], config, NAMES)
            sums.append(float(mft.loss(model, batch, config, NAMES).sum.sum().detach()))
        assert (abs(sums[0] - sums[1]) < 1e-6) == same


def test_labels_and_rationales_have_their_shares() -> None:
    model, given = random_model(), answers(5)
    task = [number % 2 for number in range(len(given))]
    means = [torch.cat([-one for one in logps(model.table, given)[k::2]]).mean() for k in (0, 1)]
    for alpha in (0.0, 0.3, 1.0):
        config = step_by_step.Config(alpha=alpha)
        total = torch.zeros((), dtype=torch.float64)
        for batch in step_by_step.balanced(batches(given, task, 2), config, ("label", "rationale")):
            total = total + step_by_step.loss(model, batch, config, ("label", "rationale")).sum.sum()
        expected = alpha * means[0] + (1 - alpha) * means[1]
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-7)
        ours, reference = (torch.autograd.grad(v, model.table, retain_graph=True)[0] for v in (total, expected))
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_what_is_told_of_a_task_is_its_own_mean() -> None:
    model, given = random_model(), answers(6)
    task = task_of(given)
    config = mft.Config(weights={"b": 0.3})
    (batch,) = mft.balanced([packed(given, task=task)], config, NAMES)
    told = mft.loss(model, batch, config, NAMES).metrics
    each = logps(model.table.detach(), given)
    for k, name in enumerate(NAMES):
        total, count = told[f"loss_{name}"].tolist()
        mean = -torch.cat([one for one, of in zip(each, task, strict=True) if of == k]).mean()
        assert total / count == pytest.approx(float(mean), rel=1e-5)
    assert list(told)[:3] == ["loss_a", "loss_b", "loss_c"]
    assert float(told["weight_b"]) == pytest.approx(0.3 / 2.3, rel=1e-5)


def softmax(values: Sequence[float]) -> list[float]:
    most = max(values)
    powers = [math.exp(value - most) for value in values]
    return [power / sum(powers) for power in powers]


def published(losses: list[list[float]], warmup: int, history: int, tau: float) -> list[float]:
    """CoBa as its authors' trainer goes about it: step by step, with a fit each, all slopes kept."""
    tasks = len(losses[0])
    ratios = numpy.array(losses) / numpy.array(losses[0])
    slopes: list[list[float]] = []
    worst: list[float] = []
    for end in range(warmup, len(losses) + 1):
        begin = max(0, end - history)
        time = numpy.arange(begin, end)
        slopes.append([float(numpy.polyfit(time, ratios[begin:end, k], 1)[0]) for k in range(tasks)])
        worst.append(float(numpy.polyfit(time, ratios[begin:end].max(1), 1)[0]))
    now, total = slopes[-1], sum(abs(slope) for slope in slopes[-1])
    relative = softmax([tasks * slope / total for slope in now])
    recent = slopes[max(0, len(losses) - history) :]
    absolute = softmax([-len(recent) * now[k] / sum(abs(one[k]) for one in recent) for k in range(tasks)])
    scale = sum(abs(slope) for slope in worst)
    factor = min(1.0, len(worst) * softmax([-tau * len(worst) * slope / scale for slope in worst])[-1])
    found = softmax([tasks * (factor * r + (1 - factor) * a) for r, a in zip(relative, absolute, strict=True)])
    least = 1 / (10 * tasks)
    return [one * (1 - least * tasks) + least for one in found] if min(found) < least else found


@pytest.mark.parametrize(("warmup", "history"), [(2, 2), (3, 11), (5, 40)])
def test_shares_are_those_of_the_published_trainer(warmup: int, history: int) -> None:
    generator = numpy.random.default_rng(1)
    walk = numpy.abs(2 + generator.normal(0, 0.05, (37, 4)).cumsum(0))
    for steps in range(warmup, 38):
        losses = walk[:steps].tolist()
        found = _coba.shares(losses, 4, warmup, history, 5.0).tolist()
        assert found == pytest.approx(published(losses, warmup, history, 5.0), abs=1e-8)
        assert sum(found) == pytest.approx(1)


def test_who_gets_worse_gets_less_and_who_is_slow_more() -> None:
    time = numpy.arange(60)
    slow, fast = 1 - 0.002 * time, numpy.exp(-0.05 * time)
    worse = fast[:30].tolist() + (fast[29] + 0.08 * numpy.arange(30)).tolist()

    def shares(*curves: Any) -> list[float]:
        return _coba.shares(numpy.array(curves).T.tolist(), len(curves), 10, 20, 5.0).tolist()

    early = shares(slow[:25], fast[:25])
    assert early[0] > 0.6
    late = shares(slow, fast, worse)
    assert min(late) == late[2] < 1 / 3
    assert late[2] >= 1 / 30
    assert shares(fast, fast, fast) == pytest.approx([1 / 3] * 3, abs=1e-9)
    assert shares([1.0] * 30, [1.0] * 30) == pytest.approx([0.5] * 2)
    assert _coba.shares([[1.0, 2.0]] * 9, 2, 10, 20, 5.0).tolist() == [0.5, 0.5]


def test_every_objective_of_tasks_says_so() -> None:
    for name in plugins.names("objectives"):
        objective = plugins.load("objectives", name)
        several = getattr(objective, "TASKS", False) or getattr(objective, "EXPLAINED", False)
        assert several == hasattr(objective, "balanced"), name
