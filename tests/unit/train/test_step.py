"""A step's gradient is that of the mean over everything its batches train on, however they are cut."""

import math
from collections.abc import Sequence

import pytest
import torch

from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import LossParts
from ftkit.train.step import clear, gradients, means

pytestmark = pytest.mark.unit

VOCABULARY = 11


def table() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
    return {"table": torch.nn.Parameter(weight)}


def loss_of(parameters: dict[str, torch.nn.Parameter], batch: RaggedBatch) -> LossParts:
    """A bigram model: the smallest thing that has a loss by token."""
    assert batch.targets is not None
    kept = batch.targets != -100
    logits = parameters["table"][batch.tokens[kept].long()]
    total = torch.nn.functional.cross_entropy(logits, batch.targets[kept].long(), reduction="sum")
    return LossParts(sum=total[None], count=kept.sum()[None].double())


def batches(cuts: Sequence[int]) -> list[RaggedBatch]:
    """Seven sequences of very different numbers of trained tokens, in batches of the given sizes."""
    generator = torch.Generator().manual_seed(5)
    sequences, targets = [], []
    for length, trained in ((3, 1), (5, 5), (7, 0), (2, 2), (13, 4), (11, 11), (1, 1)):
        sequences.append(torch.randint(VOCABULARY, (length,), generator=generator).tolist())
        answer = torch.randint(VOCABULARY, (trained,), generator=generator).tolist()
        targets.append([-100] * (length - trained) + answer)
    found, start = [], 0
    for cut in cuts:
        found.append(RaggedBatch.pack(sequences[start : start + cut], targets=targets[start : start + cut]))
        start += cut
    return found


@pytest.mark.parametrize("cuts", [(7,), (1,) * 7, (2, 1, 4), (3, 4)])
def test_the_cut_into_batches_changes_nothing(cuts: tuple[int, ...]) -> None:
    parameters, expected = table(), table()
    (whole,) = batches((7,))
    parts = loss_of(expected, whole)
    (parts.sum / parts.count).sum().backward()
    outcome = gradients(lambda batch: loss_of(parameters, batch), parameters, batches(cuts), 0.0)
    torch.testing.assert_close(parameters["table"].grad, expected["table"].grad, rtol=1e-12, atol=1e-14)
    assert outcome.loss == pytest.approx(float((parts.sum / parts.count).detach()), rel=1e-12)
    assert (outcome.tokens, outcome.trained) == (42, 24)
    assert outcome.gradient_norm == pytest.approx(float(expected["table"].grad.norm()), rel=1e-6)  # type: ignore[union-attr]
    assert means(lambda batch: loss_of(parameters, batch), batches(cuts)).loss == pytest.approx(outcome.loss, rel=1e-12)
    clear(parameters)
    assert parameters["table"].grad is None


def test_a_step_without_trained_tokens_has_no_loss_and_no_gradient() -> None:
    parameters = table()
    nothing = [RaggedBatch.pack([[1, 2]], targets=[[-100, -100]])]
    outcome = gradients(lambda batch: loss_of(parameters, batch), parameters, nothing, 1.0)
    assert math.isnan(outcome.loss)
    assert (outcome.trained, outcome.tokens, outcome.gradient_norm) == (0, 2, 0.0)
    assert parameters["table"].grad is None
