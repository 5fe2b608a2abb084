"""The chunked loss is the plain one: values, gradients, with a frozen and a trained head, and on fake tensors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny_models
from ftkit import adapters, models
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.loss import token_losses
from ftkit.nn.routes import Routes
from ftkit.objectives import sft

pytestmark = pytest.mark.unit

ROWS, WIDTH, VOCABULARY = 53, 7, 31


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_chunks_equal_the_whole(trained: bool) -> None:
    """Chunks of 16 rows, and one that is shorter, against torch's cross entropy of all logits."""
    hidden, weight = values(ROWS, WIDTH).requires_grad_(), values(VOCABULARY, WIDTH, seed=1).requires_grad_(trained)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))
    seen: list[int] = []

    def head(x: Tensor, routes: Routes | None) -> Tensor:  # noqa: ARG001
        seen.append(len(x))
        return x @ weight.T

    losses = token_losses(head, hidden, targets, VOCABULARY, head_is_trained=trained, chunk_bytes=1)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    share = values(ROWS, seed=3)  # each row's loss weighs differently
    inputs = (hidden, weight) if trained else (hidden,)
    ours = torch.autograd.grad((losses * share).sum(), inputs)
    theirs = torch.autograd.grad((expected * share).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert max(seen) == 16


def test_gradcheck() -> None:
    weight, targets = values(5, 3, seed=1), torch.tensor([0, 4, 2])
    hidden = values(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_losses(lambda h, _: h @ weight.T, x, targets, 5), (hidden,))


def test_nothing_trained_is_a_loss_of_zero(tmp_path: Path) -> None:
    model = tiny_models.ours(tiny_models.peer("llama"), tmp_path / "model").model
    adapters.attach(model, "lora", {}, seed=0)
    parts = sft.loss(model, RaggedBatch.pack([[1, 2, 3]], targets=[[-100] * 3], adapter=0))
    assert parts.sum.tolist() == parts.count.tolist() == [0.0]
    parts.sum.sum().backward()
    assert all(not p.grad.any() for p in adapters.trainable(model).values() if p.grad is not None)


def test_the_head_works_on_trained_positions_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.ours(tiny_models.peer("llama"), tmp_path / "model").model
    adapters.attach(model, "lora", {}, seed=0)
    seen: list[int] = []
    inner = model.head
    monkeypatch.setattr(model, "head", lambda hidden, routes=None: (seen.append(len(hidden)), inner(hidden, routes))[1])
    sft.loss(model, RaggedBatch.pack([[1, 2, 3], [4, 5]], targets=[[-100, 9, -100], [8, -100]], adapter=0))
    assert seen == [2]


def test_tasks_and_weights_are_counted_apart(tmp_path: Path) -> None:
    model = tiny_models.ours(tiny_models.peer("llama"), tmp_path / "model").model
    rows, targets = [[1, 2, 3], [4, 5], [6, 7]], [[2, 3, -100], [5, -100], [7, 3]]
    weights = [[1.0, 0.5, 9.0], [2.0, 9.0], [0.0, 3.0]]
    alone = [
        sft.loss(model, RaggedBatch.pack([row], targets=[target], weights=[weight]))
        for row, target, weight in zip(rows, targets, weights, strict=True)
    ]
    both = sft.loss(model, RaggedBatch.pack(rows, targets=targets, weights=weights, task=[1, 0, 1]))
    assert both.count.tolist() == [2.0, 4.5]
    torch.testing.assert_close(both.sum, torch.cat([alone[1].sum, alone[0].sum + alone[2].sum]))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("variant", ["llama tied", "qwen3 windows"])
def test_a_step_runs_on_fake_tensors(method: str, variant: str) -> None:
    """Nothing in a step asks a tensor for its values; no memory is needed for a model of 10⁵ wide layers."""
    table = tiny_models.peer(variant).config.to_dict() | {"hidden_size": 96000, "intermediate_size": 100000}
    config = models.family_of_hf(table).from_hf(table)
    with FakeTensorMode():
        model = models.build(config, torch.bfloat16)
        adapters.attach(model, method, {}, seed=0)
        model.train().recomputed_layers = model.config.layers
        batch = RaggedBatch.pack([[1] * 5, [2] * 9], targets=[[3] * 5, [-100, 4] * 4 + [5]], adapter=0)
        sft.loss(model, batch).sum.sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in adapters.trainable(model).values())
