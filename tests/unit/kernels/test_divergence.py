"""Divergences from a teacher: the formulas of the paper, as torch and trl write them, and their gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ftkit.kernels.divergence import KINDS, divergence

pytestmark = pytest.mark.unit


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(7, 31, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_trl(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """GKD's loss by position, as trl's `generalized_jsd_loss` composes it of torch's `kl_div`: 0 forward, 1 reverse."""
    q, p = (functional.log_softmax(values / temperature, -1) for values in (student, teacher))
    if beta == 0:
        return functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    mixture = torch.logsumexp(torch.stack([q + math.log1p(-beta), p + math.log(beta)]), 0)
    of_teacher = functional.kl_div(mixture, p, reduction="none", log_target=True)
    of_student = functional.kl_div(mixture, q, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("kind", "beta", "theirs"),
    [("forward_kl", 0.5, 0), ("reverse_kl", 0.5, 1), ("jsd", 0.5, 0.5), ("jsd", 0.1, 0.1), ("jsd", 0.8, 0.8)],
)
def test_values_and_gradients_are_those_of_trl(kind: str, beta: float, theirs: float, temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    expected = of_trl(student, teacher, theirs, temperature)
    share = torch.arange(1.0, 8.0, dtype=torch.float64)
    slope = torch.autograd.grad((expected * share).sum(), student)[0]
    losses, gradient = divergence(student.detach(), teacher, kind, beta, temperature, True)
    assert gradient is not None
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient * share.unsqueeze(1), slope, rtol=1e-11, atol=1e-12)
    plain, none = divergence(student, teacher, kind, beta, temperature)
    assert none is None
    assert torch.equal(plain.detach(), losses)
    torch.testing.assert_close(torch.autograd.grad((plain * share).sum(), student)[0], slope, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_not_far_from_itself(kind: str) -> None:
    losses, gradient = divergence(logits(0).float(), logits(0).float(), kind, gradient=True)
    assert gradient is not None
    assert losses.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6
    assert bool((divergence(logits(0), logits(1), kind)[0] > 0).all())


def test_a_mixture_that_is_nearly_the_student_is_the_forward_divergence() -> None:
    forward, mixed = (divergence(logits(0), logits(1), kind, 1e-7)[0] for kind in ("forward_kl", "jsd"))
    torch.testing.assert_close(mixed / 1e-7, forward, rtol=1e-3, atol=1e-3)  # the next term grows as p / q
