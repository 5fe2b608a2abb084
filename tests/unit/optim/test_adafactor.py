"""Adafactor against transformers' own, for matrices and vectors, with and without a rate relative to the weight."""

from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from ftkit.config import Choice
from ftkit.optim import adafactor, build

pytestmark = pytest.mark.unit

SHAPES = {"up_proj.weight": (37, 53), "wide.weight": (3, 101), "norm.weight": (41,)}


@pytest.mark.parametrize("chunk", [1 << 20, 64])
@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equal_to_transformers_adafactor(
    weight_decay: float, scale_parameter: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adafactor, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(4)
    ours = {name: torch.nn.Parameter(0.3 * torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in ours.items()}
    options = {
        "learning_rate": 1e-2,
        "decay": 0.7,
        "clip": 0.6,
        "scale_parameter": scale_parameter,
        "weight_decay": weight_decay,
    }
    optimizer = build(Choice(name="adafactor", options=options), ours)
    groups = [
        {"params": [weight], "weight_decay": weight_decay if weight.ndim > 1 else 0.0} for weight in theirs.values()
    ]
    peer: Any = Adafactor
    oracle = peer(
        groups, lr=1e-2, decay_rate=-0.7, clip_threshold=0.6, relative_step=False, scale_parameter=scale_parameter
    )
    for step in range(20):
        factor = 1 - step / 20
        for group in oracle.param_groups:
            group["lr"] = 1e-2 * factor
        for name, weight in ours.items():
            # rows and columns of very different sizes, so that a transposed average shows
            scales = torch.logspace(-2, 1, weight.numel()).view(weight.shape)
            weight.grad = scales * torch.randn(weight.shape, generator=generator)
            theirs[name].grad = weight.grad.clone()
        optimizer.step(factor)
        oracle.step()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=2e-5, atol=1e-6)
    state = optimizer.state()
    matrix = oracle.state[theirs["up_proj.weight"]]
    torch.testing.assert_close(state["row/up_proj.weight"], matrix["exp_avg_sq_row"], rtol=1e-5, atol=0)
    torch.testing.assert_close(state["column/up_proj.weight"], matrix["exp_avg_sq_col"], rtol=1e-5, atol=0)


def test_its_state_of_a_matrix_is_a_row_and_a_column() -> None:
    weights = {"up_proj.weight": torch.nn.Parameter(torch.zeros(37, 53))}
    state = build(Choice(name="adafactor"), weights).state()
    assert sum(value.numel() for name, value in state.items() if name != "steps") == 37 + 53
