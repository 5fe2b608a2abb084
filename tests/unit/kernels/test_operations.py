"""Every backend computes what its reference says, values and gradients, and can be pinned."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftkit import kernels
from ftkit.errors import InputError
from ftkit.kernels.attention import attention
from ftkit.kernels.cross_entropy import cross_entropy
from ftkit.kernels.lora_linear import lora_linear
from ftkit.kernels.rms_norm import rms_norm
from ftkit.kernels.swiglu import swiglu
from ftkit.nn.linear import DenseWeight

pytestmark = pytest.mark.unit

lengths = st.lists(st.integers(0, 13), min_size=1, max_size=5).filter(any)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(lengths, st.sampled_from([(6, 3), (5, 5), (7, 1)]), st.none() | st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_attention(counts: list[int], heads: tuple[int, int], window: int | None) -> None:
    total, (queries, keys) = sum(counts), heads
    inputs = [values(total, count, 11, seed=i).requires_grad_() for i, count in enumerate((queries, keys, keys))]
    slope = values(total, queries, 11, seed=3)
    found = []
    for function in (attention, attention.reference):
        output = function(*inputs, tuple(counts), scale=0.3, window=window)
        found.append([output, *torch.autograd.grad(output, inputs, slope)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


@given(lengths, st.none() | st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_attention_by_hand(counts: list[int], window: int | None) -> None:
    """A token at a time, from the formula."""
    total = sum(counts)
    q, k, v = values(total, 4, 3), values(total, 2, 3, seed=1), values(total, 2, 3, seed=2)
    found = attention(q, k, v, tuple(counts), scale=0.7, window=window)
    begin = 0
    for count in counts:
        for t in range(count):
            first = 0 if window is None else max(0, t - window + 1)
            seen = slice(begin + first, begin + t + 1)
            for head in range(4):
                shares = torch.softmax(0.7 * (k[seen, head // 2] @ q[begin + t, head]), 0)
                torch.testing.assert_close(found[begin + t, head], shares @ v[seen, head // 2])
        begin += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rounds_as_published_weights_expect(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = values(7, 13).to(dtype), values(13, seed=1).to(dtype)
    norm = LlamaRMSNorm(13, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        assert torch.equal(rms_norm.reference(x, weight, 1e-5), norm(x))
        # in float32 the core adds the squares up in another order
        torch.testing.assert_close(
            rms_norm(x, weight, 1e-5), norm(x), rtol=0 if dtype != torch.float32 else 1e-6, atol=0
        )


def test_elementwise_gradients() -> None:
    x, weight = values(5, 3, 7).requires_grad_(), values(7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, weight))
    frozen = weight.detach()
    assert torch.autograd.gradcheck(lambda a: rms_norm(a, frozen, 1e-3), (x,))
    gate, up = values(5, 7, seed=2).requires_grad_(), values(5, 7, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    slopes = values(5, 3, 7, seed=4), values(5, 7, seed=4)
    for function, inputs, slope in ((rms_norm, (x, weight, 1e-3), slopes[0]), (swiglu, (gate, up), slopes[1])):
        found = []
        for compute in (function, function.reference):
            output = compute(*inputs)
            found.append([output, *torch.autograd.grad(output, inputs[:2], slope)])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "needed", [(True, True, True), (False, True, True), (True, False, False), (False, False, True)]
)
def test_lora_linear(needed: tuple[bool, bool, bool]) -> None:
    """With each choice of what needs a gradient; the frozen weight never does."""
    weight = DenseWeight(values(11, 7))
    x, a, b = values(13, 7, seed=1), values(3, 7, seed=2), values(11, 3, seed=3)
    wanted = [t.requires_grad_() for t, need in zip((x, a, b), needed, strict=True) if need]
    slope = values(13, 11, seed=4)
    found = []
    for compute in (lora_linear, lora_linear.reference):
        output = compute(x, weight, a, b, 0.7)
        found.append([output, *torch.autograd.grad(output, wanted, slope)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert weight.tensor.grad is None


def test_fused_backward_keeps_less() -> None:
    """Bytes that autograd keeps between the passes, by operation: what the docstrings say."""

    def kept(function: Any, *inputs: Any) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = function(*inputs)
        del output
        return sum(sizes.values())

    x, weight = values(101, 53).requires_grad_(), values(53)
    assert kept(rms_norm, x, weight, 1e-5) <= x.nbytes + weight.nbytes + 101 * 8
    gate, up = values(101, 53).requires_grad_(), values(101, 53, seed=1).requires_grad_()
    assert kept(swiglu, gate, up) == 2 * gate.nbytes
    a, b = values(3, 53, seed=1).requires_grad_(), values(11, 3, seed=2).requires_grad_()
    assert kept(lora_linear, x, DenseWeight(values(11, 53)), a, b, 1.0) == x.nbytes + a.nbytes + b.nbytes + 101 * 3 * 8


def test_cross_entropy_gradient() -> None:
    logits, targets = values(5, 11).requires_grad_(), torch.tensor([0, 10, 3, 3, 7])
    losses, _ = cross_entropy(logits, targets)
    slope = torch.autograd.grad(losses.sum(), logits)[0]
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    again, direct = cross_entropy(logits.detach(), targets, gradient=True)
    assert torch.equal(again, losses)
    assert direct is not None
    torch.testing.assert_close(direct, slope)


def test_the_choice_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(kernels.backends()) >= {"attention", "cross_entropy", "rms_norm", "rope", "swiglu"}
    assert all(names[-1] == "reference" for names in kernels.backends().values())
    q, kv = values(3, 2, 4), values(3, 1, 4, seed=1)
    fast = attention(q, kv, kv, (3,), scale=1.0)
    monkeypatch.setenv(kernels.PIN, "reference")
    assert torch.equal(attention(q, kv, kv, (3,), scale=1.0), attention.reference(q, kv, kv, (3,), scale=1.0))
    monkeypatch.setenv(kernels.PIN, "sdpa")
    assert torch.equal(attention(q, kv, kv, (3,), scale=1.0), fast)
    monkeypatch.setenv(kernels.PIN, "refrence")
    with pytest.raises(InputError, match="did you mean 'reference'"):
        attention(q, kv, kv, (3,), scale=1.0)
