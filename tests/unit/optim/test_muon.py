"""Muon against torch's own, and its iteration against what it does to singular values, in float64."""

import pytest
import torch

from ftkit.config import Choice
from ftkit.optim import build, muon

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("shape", [(5, 5), (7, 31), (31, 7), (1, 13), (13, 1)])
def test_the_iteration_maps_singular_values_and_turns_nothing(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6)) * 3e-4
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = muon.COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(muon.orthogonal(matrix), (u * s @ v).float(), rtol=1e-4, atol=1e-5)


def test_singular_values_come_near_one_and_zero_stays() -> None:
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(6))
    values = torch.linalg.svdvals(muon.orthogonal(matrix))
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    assert torch.equal(muon.orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_close_to_torchs_muon_which_iterates_in_bfloat16(weight_decay: float, shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"learning_rate": 1e-2, "momentum": 0.9, "weight_decay": weight_decay}
    optimizer = build(Choice(name="muon", options=options), {"up_proj.weight": ours})
    oracle = torch.optim.Muon(
        [theirs], lr=1e-2, momentum=0.9, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(10):
        factor = 1 - step / 20
        oracle.param_groups[0]["lr"] = 1e-2 * factor
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        optimizer.step(factor)
        oracle.step()
    apart, moved = (ours - theirs).detach().norm(), (theirs - start).detach().norm()
    assert float(apart / moved) < 0.01
    torch.testing.assert_close(
        optimizer.state()["momentum/up_proj.weight"], oracle.state[theirs]["momentum_buffer"], rtol=1e-5, atol=1e-6
    )


def test_embeddings_heads_and_vectors_follow_adamw() -> None:
    shapes = {"model.embed_tokens.weight": (7, 5), "lm_head.weight": (7, 5), "norm.weight": (5,)}
    shapes["model.embed_tokens.lora_A"] = (3, 7)
    ours = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    theirs = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    options = {"learning_rate": 1e-2, "beta1": 0.8, "weight_decay": 0.1}
    optimizers = [build(Choice(name=name, options=options), w) for name, w in (("muon", ours), ("adamw", theirs))]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for name in shapes:
            ours[name].grad = theirs[name].grad = torch.randn(shapes[name], generator=generator)
        for optimizer in optimizers:
            optimizer.step(1.0)
    assert all(torch.equal(ours[name], theirs[name]) for name in shapes)
