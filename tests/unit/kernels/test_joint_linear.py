"""Weight and low-rank matrix quantized together: the fast path is the reference, and both are the papers' formulas."""

import pytest
import torch
from torch import Tensor

from ftkit.kernels.joint_linear import LEAST_STEP, Grid, Trained, codes, joint_linear, stored
from ftkit.nn.linear import DenseWeight
from ftkit.quant import int4_group

pytestmark = pytest.mark.unit

OUT, GROUPS, GROUP, RANK, ROWS = 37, 3, 32, 5, 11
NAMES = ("a", "b", "log_steps", "zero_points")


def layer(bits: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, DenseWeight, Trained, Grid, Tensor]:
    """x, W, what is trained, the grid and a gradient dy; a tenth of the values lies outside of the codes."""
    generator = torch.Generator().manual_seed(bits)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    highest, w = 2**bits - 1, random(OUT, GROUPS * GROUP)
    steps = w.view(OUT, GROUPS, GROUP).abs().amax(2).view(-1) * 1.5 / highest
    zeros = torch.full_like(steps, highest / 2) + 0.2 * random(OUT * GROUPS)
    parts = {"a": random(RANK, GROUPS * GROUP), "b": 0.2 * random(OUT, RANK), "log_steps": steps.log()}
    parts = {name: part.to(dtype).requires_grad_() for name, part in (parts | {"zero_points": zeros}).items()}
    grid = Grid(highest=highest, group=GROUP, scale=torch.tensor(0.7, dtype=torch.float64))
    x, dy = random(ROWS, GROUPS * GROUP).to(dtype).requires_grad_(), random(ROWS, OUT).to(dtype)
    return x, DenseWeight(w.to(dtype)), Trained(**parts), grid, dy


def values(trained: Trained) -> list[Tensor]:
    return [getattr(trained, name) for name in NAMES]


def by_hand(w: Tensor, trained: Trained, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, q, and d and m [out, groups, 1]."""
    d, m = (part.double().unsqueeze(2) for part in stored(trained))
    v = w + grid.scale * (trained.b @ trained.a).detach()
    u = (v.view(OUT, GROUPS, GROUP) - m) / d
    return u, u.round().clamp(0, grid.highest), d, m


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_fast_path_is_the_reference(bits: int) -> None:
    x, weight, trained, grid, dy = layer(bits)
    assert joint_linear.backends == ["fused", "reference"]
    found = []
    for function in (joint_linear, joint_linear.reference):
        y = function(x, weight, trained, grid)
        found.append([y, *torch.autograd.grad(y, (x, *values(trained)), dy)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_gradient_of_the_sum_passes_inside_the_codes_alone(bits: int) -> None:
    x, weight, trained, grid, dy = layer(bits)
    u, _, _, _ = by_hand(weight.dense(), trained, grid)
    inside = ((u > -0.5) & (u < grid.highest + 0.5)).view(OUT, -1)
    assert 0.02 < 1 - inside.double().mean() < 0.5
    dv = (dy.T @ x.detach()) * inside
    da, db = torch.autograd.grad(joint_linear(x, weight, trained, grid), (trained.a, trained.b), dy)
    torch.testing.assert_close(da, grid.scale * trained.b.T @ dv, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(db, grid.scale * dv @ trained.a.T, rtol=1e-11, atol=1e-11)


def test_steps_and_offsets_have_the_slopes_of_what_is_smooth_between_two_codes() -> None:
    """Finite differences, with every rounding's error held at what it is: what passing straight through means."""
    x, weight, trained, grid, dy = layer()
    u, q, d, m = by_hand(weight.dense(), trained, grid)
    error, v, inside = u.round() - u, u * d + m, u.round() == q
    first, zeros = trained.log_steps.detach(), trained.zero_points.detach().view_as(d)

    def smooth(log_steps: Tensor, zero_points: Tensor) -> float:
        steps = d + (log_steps.exp() - first.exp()).view_as(d)
        offsets = m - (steps * zero_points.view_as(d) - d * zeros)
        soft = torch.where(inside, (v - offsets) / steps + error, q)
        return float((x @ (steps * soft + offsets).view(OUT, -1).T * dy).sum().detach())

    found = torch.autograd.grad(joint_linear(x, weight, trained, grid), (trained.log_steps, trained.zero_points), dy)
    start = [trained.log_steps.detach(), trained.zero_points.detach()]
    some = torch.arange(0, first.numel(), 7)
    for number, gradient in enumerate(found):
        assert bool((gradient != 0).any())
        for index in some.tolist():
            slopes = []
            for sign in (1, -1):
                moved = [part.clone() for part in start]
                moved[number][index] += sign * 1e-6
                slopes.append(smooth(*moved))
            expected = (slopes[0] - slopes[1]) / 2e-6
            assert float(gradient[index]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_is_computed_with_is_what_a_file_decodes_to(dtype: torch.dtype) -> None:
    x, weight, trained, grid, _ = layer(4, torch.float32)
    trained = Trained(**{name: part.detach() for name, part in zip(NAMES, values(trained), strict=True)})
    numbers, (d, m) = codes(weight, trained, grid), stored(trained)
    assert (int(numbers.min()), int(numbers.max())) == (0, 15)
    parts = {"codes": numbers[:, ::2] << 4 | numbers[:, 1::2], "scales": d, "offsets": m}
    held = int4_group.scheme("32").hold(parts, weight.shape, dtype)
    eye = torch.eye(x.shape[1], dtype=dtype)
    assert torch.equal(joint_linear(eye, weight, trained, grid).T, held.dense())
    assert torch.equal(joint_linear.reference(eye, weight, trained, grid).T, held.dense())


def test_steps_never_reach_zero() -> None:
    x, weight, trained, grid, dy = layer()
    with torch.no_grad():
        trained.log_steps.sub_(100)
    y = joint_linear(x, weight, trained, grid)
    assert float(stored(trained)[0].min()) == LEAST_STEP
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y, values(trained), dy))


def test_little_is_kept_for_the_backward_pass() -> None:
    x, weight, trained, grid, dy = layer()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = joint_linear(x.detach(), weight, trained, grid)
    y.backward(dy)
    assert x.grad is None
    assert sorted(kept) == sorted([x.numel(), *(part.numel() for part in values(trained))])
