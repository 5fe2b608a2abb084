"""A layer whose offsets a low-rank matrix moves: the fast path is the reference, and the rounding is passed through."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ftkit.kernels.offset_linear import moved, offset_linear
from ftkit.nn.linear import GroupOffsets
from ftkit.quant import int4_group

pytestmark = pytest.mark.unit

OUT, GROUPS, RANK, ROWS = 37, 3, 5, 11


def layer(seed: int = 0) -> tuple[GroupOffsets, Tensor, Tensor, Tensor, Tensor]:
    """The offsets of a weight, x, A, B and a gradient dy."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(OUT, 32 * GROUPS), (ROWS, 32 * GROUPS), (RANK, GROUPS), (OUT, RANK), (ROWS, OUT)]
    w, x, a, b, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    offsets = int4_group.scheme("32").weight(w, torch.float64).group_offsets()
    assert offsets is not None
    return offsets, x.requires_grad_(), a.requires_grad_(), b.requires_grad_(), dy


def test_the_fast_path_is_the_reference() -> None:
    offsets, x, a, b, dy = layer()
    assert offset_linear.backends == ["fused", "reference"]
    found = []
    for function in (offset_linear, offset_linear.reference):
        y = function(x, offsets, a, b, 0.7)
        found.append([y, *torch.autograd.grad(y, (x, a, b), dy)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_a_lora_on_sums() -> None:
    offsets, x, a, b, dy = layer()
    sums = x.detach().unflatten(1, (GROUPS, 32)).sum(2)
    expected = torch.autograd.grad(0.7 * functional.linear(functional.linear(sums, a), b), (a, b), dy)
    got = torch.autograd.grad(offset_linear(x, offsets, a, b, 0.7), (a, b), dy)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_offsets_are_halves_near_what_was_asked_for() -> None:
    offsets, _, a, b, _ = layer()
    values = moved(offsets.values, a, b, 0.7)
    exact = offsets.values.double() + 0.7 * b @ a
    assert values.dtype == torch.float16
    assert torch.equal(values, exact.half())
    assert ((values - exact).abs() <= exact.abs() * 2.0**-11 + 2.0**-25).all()
    assert not torch.equal(values.double(), exact)


def test_only_what_needs_a_gradient_gets_one_and_little_is_kept() -> None:
    offsets, x, a, b, dy = layer()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = offset_linear(x.detach(), offsets, a, b.detach(), 0.7)
    y.backward(dy)
    assert a.grad is not None
    assert (x.grad, b.grad) == (None, None)
    assert sorted(kept) == sorted([ROWS * GROUPS, a.numel(), b.numel()])
