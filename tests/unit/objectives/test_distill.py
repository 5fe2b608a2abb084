"""Distillation from the base model: values and gradients are those of plain torch over all logits at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tiny_models
from ftkit import adapters, optim
from ftkit.config import Choice
from ftkit.errors import InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.objectives import distill

pytestmark = pytest.mark.unit

ROWS = [[(7 * i * length + 3 * i * i) % 97 for i in range(length)] for length in (19, 31, 3)]
TARGETS = [[-100, *row[2:], -100] for row in ROWS]
WEIGHTS = [[0.5 + 0.1 * i for i in range(len(row))] for row in ROWS]
RATE = 5e-3
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"keep_base": True},
    "qalora": {"variant": "joint", "bits": 3},
}


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    theirs = tiny_models.peer("llama", sizes=tiny_models.GROUPED)
    return tiny_models.ours(theirs, tmp_path / "model").model


def batch(**more: Any) -> RaggedBatch:
    return RaggedBatch.pack(ROWS, targets=TARGETS, weights=WEIGHTS, adapter=0, **more)


def disturb(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def gradients(value: Tensor, model: Decoder) -> list[Tensor]:
    found = torch.autograd.grad(value, list(adapters.trainable(model).values()), allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_plain_torch(model: Decoder, method: str, kind: str) -> None:
    adapters.attach(model, method, METHODS[method], seed=1)
    disturb(model)
    ours = batch()
    parts = distill.loss(model, ours, distill.Config(divergence=kind, beta=0.3, temperature=1.7))  # type: ignore[arg-type]
    base = ours.with_adapter(-1)
    logits, teacher = (model.head(model(given), given.routes) / 1.7 for given in (ours, base))
    q, p = functional.log_softmax(logits, -1), functional.log_softmax(teacher.detach(), -1)
    pairs = {"forward_kl": [(q, p, 1.0)], "reverse_kl": [(p, q, 1.0)]}
    mixture = (0.3 * p.exp() + 0.7 * q.exp()).log()
    sums = pairs.get(kind, [(mixture, p, 0.3), (mixture, q, 0.7)])
    each = sum(share * functional.kl_div(a, b, reduction="none", log_target=True).sum(-1) for a, b, share in sums)
    assert isinstance(each, Tensor)
    assert ours.targets is not None
    assert ours.weights is not None
    trained = (ours.targets != -100) * ours.weights.double()
    torch.testing.assert_close(parts.sum, (each * trained).sum().view(1), rtol=1e-9, atol=1e-9)
    assert float(parts.count) == pytest.approx(float(trained.sum()))
    assert float(parts.sum.detach()) > 0.01
    found, expected = gradients(parts.sum.sum(), model), gradients((each * trained).sum(), model)
    assert found
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_teacher_gets_no_gradient_and_a_new_adapter_has_nothing_to_learn(model: Decoder) -> None:
    adapters.attach(model, "lora", {}, seed=1)
    parts = distill.loss(model, batch(), distill.Config())
    assert float(parts.sum.detach().abs()) < 1e-9
    parts.sum.sum().backward()
    known = {id(parameter) for parameter in adapters.trainable(model).values()}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in known)


def test_tasks_are_counted_apart(model: Decoder) -> None:
    adapters.attach(model, "qalora", METHODS["qalora"], seed=1)
    whole, apart = (distill.loss(model, batch(**more), distill.Config()) for more in ({}, {"task": [1, 0, 1]}))
    assert apart.sum.shape == (2,)
    torch.testing.assert_close(apart.sum.sum(), whole.sum.sum())
    torch.testing.assert_close(apart.count.sum(), whole.count.sum())


def test_a_method_that_edits_the_base_has_no_teacher(model: Decoder) -> None:
    adapters.attach(model, "full", {}, seed=1)
    with pytest.raises(InputError, match="expected a method that leaves the base as it is"):
        distill.loss(model, batch(), distill.Config())


def test_three_bits_learn_from_the_dense_model(tmp_path: Path) -> None:
    """Thirty steps take more than a fifth of what rounding to nearest lost."""
    theirs = tiny_models.peer("llama", sizes=tiny_models.GROUPED)
    model = tiny_models.ours(theirs, tmp_path / "model", torch.float32).model
    adapters.attach(model, "qalora", METHODS["qalora"], seed=1)
    parameters = adapters.trainable(model)
    optimizer = optim.build(Choice(name="adamw", options={"learning_rate": RATE}), parameters)
    losses = []
    for _ in range(31):
        parts = distill.loss(model, batch(), distill.Config())
        losses.append(float((parts.sum / parts.count).detach()))
        parts.sum.sum().backward()
        optimizer.step(1.0)
        for parameter in parameters.values():
            parameter.grad = None
    assert losses[-1] < 0.8 * losses[0]


def test_options_are_checked() -> None:
    from ftkit.config import RunConfig

    table = {"model.source": "m", "data.path": "d", "objective.name": "distill", "objective.beta": 1.0}
    with pytest.raises(InputError, match="below 1"):
        RunConfig.from_toml(None, table)
