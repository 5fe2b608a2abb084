"""AdamW against torch's own, over random gradients; bfloat16 weights against a float32 run."""

import pytest
import torch

from ftkit.config import Choice
from ftkit.optim import build, clip

pytestmark = pytest.mark.unit

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "model.embed_tokens.weight": (11, 3)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def set_gradients(weights: dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equal_to_torchs_adamw_with_decay_on_matrices_only(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = build(Choice(name="adamw", options={"learning_rate": 1e-2, "weight_decay": weight_decay}), ours)
    groups = [
        {"params": [theirs["a.weight"]], "weight_decay": weight_decay},
        {"params": [theirs["a.bias"], theirs["model.embed_tokens.weight"]], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(20):
        factor = 1 - step / 20
        for group in oracle.param_groups:
            group["lr"] = 1e-2 * factor
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(factor)
        oracle.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_bfloat16_weights_follow_a_float32_copy_so_small_updates_add_up() -> None:
    low, full = parameters(torch.bfloat16), parameters(torch.bfloat16)
    full = {name: torch.nn.Parameter(weight.detach().float()) for name, weight in full.items()}
    settings = Choice(name="adamw", options={"learning_rate": 1e-5})
    optimizers = build(settings, low), build(settings, full)
    for step in range(300):
        set_gradients(low, step // 100)
        for name, weight in full.items():
            weight.grad = low[name].grad.float()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step(1.0)
    for name in SHAPES:
        assert torch.equal(low[name], full[name].to(torch.bfloat16))
    assert not torch.equal(low["a.weight"], parameters(torch.bfloat16)["a.weight"])


def test_clipping_scales_to_the_common_norm_and_equals_torchs() -> None:
    ours, theirs = parameters(), parameters()
    set_gradients(ours, 3)
    set_gradients(theirs, 3)
    norm = clip(ours, 0.5)
    oracle = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
    assert norm == pytest.approx(float(oracle), rel=1e-6)
    for name in SHAPES:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)
    assert clip(ours, 0.5) == pytest.approx(0.5, rel=1e-5)
    before = {name: weight.grad.clone() for name, weight in ours.items()}  # type: ignore[union-attr]
    assert clip(ours, 0.0) == pytest.approx(0.5, rel=1e-5)
    assert all(torch.equal(before[name], ours[name].grad) for name in SHAPES)  # type: ignore[arg-type]


def test_clipping_reports_a_norm_that_is_not_finite() -> None:
    weights = parameters()
    set_gradients(weights, 0)
    weights["a.bias"].grad[0] = float("nan")  # type: ignore[index]
    assert clip(weights, 1.0) != clip(weights, 1.0)
    assert clip({}, 1.0) == 0.0
