"""Attention of a training step and its gradients, in the emulator."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.cuda.emulated import Kit, normal
from torch import Tensor

from ftkit.cuda import attention as launches
from ftkit.cuda.on_cpu import SCHEDULES
from ftkit.errors import InputError
from ftkit.kernels import _gpu, pinned
from ftkit.kernels.attention import attention

pytestmark = pytest.mark.unit


def batch(lengths: tuple[int, ...], heads: tuple[int, int], size: int) -> list[Tensor]:
    """q, k, v and dy."""
    total = sum(lengths)
    return [normal(total, heads[i in (1, 2)], size, seed=i) for i in range(4)]


def run(kit: Kit, schedule: int, tensors: list[Tensor], lengths: tuple[int, ...], window: int | None) -> list[Tensor]:
    """y, dq, dk, dv."""
    q, k, v, dy = tensors
    ends, scale = torch.tensor([0, *lengths]).cumsum(0).int(), q.shape[2] ** -0.5
    y, m = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
    launches.forward(kit.launcher(schedule), q, k, v, ends, scale, window, y, m)
    gradients = [torch.full_like(one, torch.nan) for one in (q, k, v)]
    launches.backward(kit.launcher(schedule), q, k, v, ends, scale, window, y, m, dy, *gradients)
    return [y, *gradients]


def near(found: list[Tensor], tensors: list[Tensor], lengths: tuple[int, ...], window: int | None) -> None:
    """Weights and their slopes are rounded to bfloat16 before sums of values of about 1, and so is the result.

    Where a gradient is 0, as q's by a window of 1, the kernel subtracts two sums of 64 products in float32: an ulp or
    two of about 8, times the scale and a key, are 1e-6 to 2e-6 of a row's length (1.0e-5 was seen of 624 rows).
    """
    *leaves, dy = (one.double().requires_grad_() for one in tensors)
    y = attention.reference(*leaves, lengths, scale=leaves[0].shape[2] ** -0.5, window=window)
    for one, expected in zip(found, (y, *torch.autograd.grad(y, leaves, dy)), strict=True):
        torch.testing.assert_close(one.double(), expected.detach(), rtol=2e-2, atol=2e-2)
        rounding = max(1e-5, 2e-6 * expected[..., 0].numel() ** 0.5)
        assert (one.double() - expected).norm() <= 6e-3 * expected.norm() + rounding


def trial(
    kit: Kit, schedule: int, lengths: tuple[int, ...], heads: tuple[int, int], size: int, window: int | None
) -> None:
    tensors = batch(lengths, heads, size)
    near(run(kit, schedule, tensors, lengths, window), tensors, lengths, window)


CASES = [
    ((1, 70, 0, 33), (2, 1), 64, None),  # one token, an empty sequence, more than a block and than a step
    ((67, 5), (3, 3), 64, 21),
    ((35,), (2, 2), 128, None),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("lengths", "heads", "size", "window"), CASES)
def test_values_and_gradients(
    kit: Kit, lengths: tuple[int, ...], heads: tuple[int, int], size: int, window: int | None, schedule: int
) -> None:
    trial(kit, schedule, lengths, heads, size, window)


@given(
    st.lists(st.integers(0, 80), min_size=1, max_size=3).filter(any),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([None, 1, 31, 40]),
    st.sampled_from(SCHEDULES),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lengths_heads_and_windows(
    kit: Kit, lengths: list[int], heads: tuple[int, int], window: int | None, schedule: int
) -> None:
    trial(kit, schedule, tuple(lengths), heads, 64, window)


def test_a_sequence_has_the_bits_it_has_alone(kit: Kit) -> None:
    lengths, tensors = (13, 71, 30), batch((13, 71, 30), (2, 1), 64)
    alone = run(kit, 0, [one[13:84].contiguous() for one in tensors], (71,), None)
    for one, other in zip(run(kit, 1, tensors, lengths, None), alone, strict=True):
        assert torch.equal(one[13:84], other)


def test_great_scores_do_not_overflow(kit: Kit) -> None:
    tensors = batch((40,), (1, 1), 64)
    tensors[0] = tensors[0] * 300
    found = run(kit, 0, tensors, (40,), None)
    assert all(one.isfinite().all() for one in found)
    expected = attention.reference(*(one.double() for one in tensors[:3]), (40,), scale=0.125)
    torch.testing.assert_close(found[0].double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("window", [None, 9])
def test_as_an_operation(gpu: list[str], window: int | None) -> None:
    """Several sequences or a window are the kernels', and gradients come by autograd."""
    lengths = (20, 11) if window is None else (31,)
    *tensors, dy = batch((20, 11), (4, 2), 64)
    leaves = [one.requires_grad_() for one in tensors]
    with torch.library._scoped_library("ftkit", "IMPL") as library:
        for name in ("attention_forward", "attention_backward"):
            library.impl(name, _gpu.runs[name], "CPU", allow_override=True)
        y = attention(*leaves, lengths, scale=0.125, window=window)
        found = [y, *torch.autograd.grad(y, leaves, dy)]
    assert gpu == ["attention_forward", "attention_dq", "attention_dkv"]
    near([one.detach() for one in found], [*(one.detach() for one in tensors), dy], lengths, window)


def test_what_is_torchs(gpu: list[str]) -> None:
    q, k, v, _ = batch((20, 11), (4, 2), 64)
    with pinned("cuda,sdpa"):
        attention(q, k, v, (31,), scale=0.125)
        attention(q, k, v, (20, 11), scale=0.125, shared=(0, 5))
        attention(q.float(), k.float(), v.float(), (20, 11), scale=0.125)
        attention(*batch((20, 11), (4, 2), 32)[:3], (20, 11), scale=0.125)
    assert not gpu


def test_bad_arguments_are_named(kit: Kit) -> None:
    tensors = batch((20,), (4, 2), 64)
    for place, other, message in (
        (1, normal(19, 2, 64), r"k: expected the shape \[20, 2, 64\], got \[19, 2, 64\]"),
        (0, normal(20, 3, 64), r"expected heads that are a multiple of 2, got 3"),
        (2, normal(20, 2, 64).float(), r"v: expected torch.bfloat16, got torch.float32"),
    ):
        changed = [*tensors]
        changed[place] = other
        with pytest.raises(InputError, match="attention_forward: " + message):
            run(kit, 0, changed, (20,), None)


def test_nothing_is_launched_for_no_tokens() -> None:
    q, k, v, dy = batch((0,), (4, 2), 64)
    ends, m = torch.zeros(2, dtype=torch.int32), torch.empty(0, 4)

    def launch(*_: object) -> None:
        raise AssertionError("expected no launch")

    launches.forward(launch, q, k, v, ends, 1.0, None, q.clone(), m)
    launches.backward(launch, q, k, v, ends, 1.0, None, q, m, dy, q.clone(), k.clone(), v.clone())
