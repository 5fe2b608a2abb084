"""The reference of a preference is the model without its adapter: on a real forward pass, in any packing, exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from ftkit import adapters, plugins
from ftkit.errors import InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.objectives import LossParts

pytestmark = pytest.mark.unit

ROWS = [[(7 * i * length + 3 * i * i) % 97 for i in range(length)] for length in (19, 31, 5, 4, 23, 11)]
TARGETS = [[-100, *row[2:], -100] for row in ROWS]


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    theirs = tiny_models.peer("llama", sizes=tiny_models.GROUPED)
    return tiny_models.ours(theirs, tmp_path / "model").model


def batch(rows: slice = slice(None)) -> RaggedBatch:
    group = [0, 0, 1, 1, 2, 2][rows]
    return RaggedBatch.pack(ROWS[rows], targets=TARGETS[rows], adapter=0, group=group, task=[0, 1] * (len(group) // 2))


def loss_of(name: str, model: Decoder, rows: RaggedBatch, **options: Any) -> LossParts:
    objective = plugins.load("objectives", name)
    found: LossParts = objective.loss(model, rows, objective.Config(**options))
    return found


def disturb(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def gradients(value: Tensor, model: Decoder) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(adapters.trainable(model).values())))


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("full", {"keep_base": True})])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    model: Decoder, method: str, options: dict[str, Any]
) -> None:
    adapters.attach(model, method, options, seed=1)
    disturb(model)
    ours = batch()
    parts = loss_of("dpo", model, ours, beta=0.3)
    assert ours.targets is not None
    kept = ours.targets != -100
    sums = []
    for given in (ours, ours.with_adapter(-1)):
        scores = torch.log_softmax(model.head(model(given), given.routes), -1)
        each = scores[kept].gather(1, ours.targets[kept].long().unsqueeze(1)).squeeze(1)
        sums.append(torch.stack([each[ours.sequence[kept] == number].sum() for number in range(6)]))
    ratios = (sums[0] - sums[1].detach()).view(3, 2)
    expected = -torch.nn.functional.logsigmoid(0.3 * (ratios[:, 0] - ratios[:, 1])).sum()
    torch.testing.assert_close(parts.sum.sum(), expected, rtol=1e-9, atol=1e-9)
    assert float(parts.metrics["kl"]) > 1e-3
    found = gradients(parts.sum.sum(), model)
    assert max(float(one.abs().max()) for one in found) > 1e-4
    for one, other in zip(found, gradients(expected, model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dpo", "lc_dpo", "ipo", "simpo", "cpo", "orpo", "kto"])
def test_packed_and_alone_are_one(model: Decoder, name: str) -> None:
    adapters.attach(model, "lora", {}, seed=1)
    disturb(model)
    together = loss_of(name, model, batch())
    apart = [loss_of(name, model, batch(slice(start, start + 2))) for start in (0, 2, 4)]
    total = torch.stack([parts.sum for parts in apart]).sum()
    torch.testing.assert_close(together.sum.sum(), total, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(together.sum.sum(), model), gradients(total, model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_new_adapter_is_its_reference(model: Decoder) -> None:
    adapters.attach(model, "lora", {}, seed=1)
    parts = loss_of("dpo", model, batch())
    torch.testing.assert_close(parts.sum.sum() / 3, torch.tensor(2.0, dtype=torch.float64).log())
    assert float(parts.metrics["kl"]) == 0


@pytest.mark.parametrize("name", ["dpo", "lc_dpo", "ipo", "kto"])
def test_a_method_that_edits_the_base_has_no_reference(model: Decoder, name: str) -> None:
    adapters.attach(model, "full", {}, seed=1)
    with pytest.raises(InputError, match=f"{name}: expected a method that leaves the base as it is") as error:
        loss_of(name, model, batch())
    assert "keep_base" in str(error.value.hint)


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_losses_without_a_reference_train_the_base(model: Decoder, name: str) -> None:
    adapters.attach(model, "full", {}, seed=1)
    loss_of(name, model, batch()).sum.sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.trainable(model).values())
