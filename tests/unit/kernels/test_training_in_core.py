"""The core's kernels of a training step: what the references say, and the same bits in any company on any threads."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftkit import _core, adapters
from ftkit.errors import FtkitError
from ftkit.kernels import pinned
from ftkit.kernels.attention import attention
from ftkit.kernels.cross_entropy import cross_entropy
from ftkit.kernels.lora_linears import Origin, lora_linears
from ftkit.kernels.rms_norm import rms_norm
from ftkit.kernels.rope import rope
from ftkit.kernels.swiglu import swiglu
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder, DecoderConfig, Maker
from ftkit.nn.linear import DenseWeight
from ftkit.nn.rotary import Rope
from ftkit.quant import nf4
from ftkit.quant.gguf import GgufWeight

pytestmark = pytest.mark.unit


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(function: Any, inputs: list[Tensor], slope_seed: int = 99) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, of the core in float32 and of the reference in float64."""
    found = []
    for compute, dtype in ((function, torch.float32), (getattr(function, "reference", function), torch.float64)):
        given_ = [x.detach().to(dtype).requires_grad_() for x in inputs]
        output = compute(*given_)
        outputs = list(output) if isinstance(output, tuple) else [output]
        slopes = [values(*y.shape, seed=slope_seed + i).to(dtype) for i, y in enumerate(outputs)]
        found.append([*outputs, *torch.autograd.grad(outputs, given_, slopes)])
    return found[0], found[1]


def close(ours: list[Tensor], reference: list[Tensor]) -> None:
    for a, b in zip(ours, reference, strict=True):
        size = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-4, atol=2e-5 * size)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths, and what each sequence shares with the last whole one before it."""
    lengths = draw(st.lists(st.integers(0, 150), min_size=1, max_size=4).filter(any))
    shared, whole = [0], lengths[0]
    for length in lengths[1:]:
        shared.append(draw(st.integers(0, whole) | st.just(0)))
        whole = length if shared[-1] == 0 else whole
    return tuple(lengths), tuple(shared)


class _Attend:
    """Attention of three tensors alone."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with pinned("cpu"):
            return attention(q, k, v, **self.settings)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.reference(q, k, v, **self.settings)


@given(ragged(), st.sampled_from([(6, 3, 11), (5, 5, 16), (7, 1, 37), (4, 2, 64)]), st.none() | st.integers(1, 90))
@settings(max_examples=30, deadline=None)
def test_attention(
    rows: tuple[tuple[int, ...], tuple[int, ...]], heads: tuple[int, int, int], window: int | None
) -> None:
    lengths, shared = rows
    queries, keys, dim = heads
    total = sum(lengths)
    inputs = [values(total, count, dim, seed=i) for i, count in enumerate((queries, keys, keys))]
    attend = _Attend(lengths=lengths, scale=dim**-0.5, window=window, shared=shared)
    close(*both(attend, inputs))


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (100 * values(70, 1, 8, seed=i) for i in range(3))
    attend = _Attend(lengths=(70,), scale=1.0)
    ours, reference = both(attend, [q, k, v])
    assert all(bool(x.isfinite().all()) for x in ours)
    torch.testing.assert_close(ours[0], reference[0].float(), rtol=1e-3, atol=1e-2)


def test_attention_gives_a_sequence_the_same_bits_alone_and_in_company() -> None:
    lengths = (67, 130, 5)
    q, k, v = (values(sum(lengths), count, 16, seed=i).requires_grad_() for i, count in enumerate((4, 2, 2)))
    whole = attention(q, k, v, lengths, scale=0.25)
    slope = values(*whole.shape, seed=3)
    gradients = torch.autograd.grad(whole, (q, k, v), slope)
    part = slice(67, 197)
    alone = [x.detach()[part].clone().requires_grad_() for x in (q, k, v)]
    output = attention(*alone, (130,), scale=0.25)
    assert torch.equal(output, whole[part])
    for one, all_ in zip(torch.autograd.grad(output, alone, slope[part]), gradients, strict=True):
        assert torch.equal(one, all_[part])


@pytest.mark.parametrize("kind", ["dense", "q8_0"])
def test_linears_of_the_same_inputs(kind: str) -> None:
    """Gradients of x, A and B of three layers of different widths and ranks, over W dense or in blocks."""
    inp, shapes = 96, ((75, 5), (64, 16), (130, 3))
    x = values(131, inp, seed=1)
    weights: list[Any] = []
    for i, (out, _) in enumerate(shapes):
        w = values(out, inp, seed=10 + i)
        if kind == "dense":
            weights.append(DenseWeight(w))
        else:
            blocks = torch.empty(out * inp // 32 * 34, dtype=torch.uint8)
            _core.quantize("q8_0", w, blocks)
            weights.append(GgufWeight(blocks.view(out, -1), "q8_0", torch.float32))
    parts = [
        values(*shape, seed=20 + i) for i, (out, rank) in enumerate(shapes) for shape in ((rank, inp), (out, rank))
    ]

    def ours(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return lora_linears(x, weights, [(parts[2 * i], parts[2 * i + 1], 0.7 + i) for i in range(3)])

    def theirs(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        dense = [weight.dense().double() for weight in weights]
        return tuple(x @ w.T + (0.7 + i) * (x @ parts[2 * i].T) @ parts[2 * i + 1].T for i, w in enumerate(dense))

    ours.reference = theirs  # type: ignore[attr-defined]
    close(*both(ours, [x, *parts]))


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
def test_only_what_is_asked_for_gets_a_gradient(trains: tuple[bool, bool]) -> None:
    x, a, b = values(13, 32), values(4, 32, seed=1), values(48, 4, seed=2)
    x.requires_grad_(trains[0])
    a.requires_grad_(trains[1])
    b.requires_grad_(trains[1])
    (y,) = lora_linears(x, [DenseWeight(values(48, 32, seed=3))], [(a, b, 1.0)])
    y.sum().backward()
    assert [part.grad is not None for part in (x, a, b)] == [trains[0], trains[1], trains[1]]


def test_inputs_made_again_give_the_same_bits_and_are_not_kept() -> None:
    gate, up, a = values(131, 96), values(131, 96, seed=1), values(5, 96, seed=2)
    b, slope, weight = values(75, 5, seed=3), values(131, 75, seed=4), DenseWeight(values(75, 96, seed=5))
    inputs = [part.requires_grad_() for part in (gate, up, a, b)]
    found, kept = [], []
    for origin in (None, Origin(swiglu, (gate, up))):
        storages: set[int] = set()

        def note(tensor: Tensor, storages: set[int] = storages) -> Tensor:
            storages.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            x = swiglu(gate, up)
            (y,) = lora_linears(x, [weight], [(a, b, 0.7)], origin)
        kept.append(x.untyped_storage().data_ptr() in storages)
        found.append([y, *torch.autograd.grad(y, inputs, slope)])
    assert kept == [True, False]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_decoder_keeps_no_norms_and_no_activations() -> None:
    """To the byte, of a token and layer: 5 d (x before attention and before the feed-forward, q, k beside v, what
    attention gives), gate and up, two norms' roots, a logarithm a head, 7 low ranks. The first norm has no way back and
    keeps no roots."""
    tokens, d, inner, rank = 67, 32, 48, 3
    config = DecoderConfig(
        family="llama",
        variant="llama",
        vocab_size=40,
        hidden_size=d,
        intermediate_size=inner,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_dim=8,
        context_length=128,
        norm_epsilon=1e-5,
        rope=Rope(),
    )
    model = Decoder(config, Maker(lambda _, shape: values(*shape), 1e-5)).train()
    adapters.attach(model, "lora", {"rank": rank}, 0, 0)
    batch = RaggedBatch.pack([[1] * tokens], adapter=0)
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape[0] == tokens:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model(batch)
    del hidden
    angles, layer, last = 8, 5 * d + 2 * inner + 2 + 4 + 7 * rank, d + 1
    assert sum(sizes.values()) == 4 * tokens * (angles + 2 * layer - 1 + last)


def test_rows_passes() -> None:
    x, weight = values(37, 50), values(50, seed=1)
    close(*both(_with(rms_norm, 1e-3), [x, weight]))
    close(*both(swiglu, [3 * values(37, 50), values(37, 50, seed=1)]))
    angles = values(37, 6, seed=2)
    heads = values(37, 5, 12, seed=3).requires_grad_()
    slope = values(37, 5, 12, seed=4)
    found = []
    for compute in (rope, rope.reference):
        y = compute(heads, angles.cos(), angles.sin())
        found.append([y, *torch.autograd.grad(y, [heads], slope)])
    close(*found)


def test_bfloat16_errs_less_than_torchs_operations() -> None:
    """Against float64 of the same numbers, all outputs and gradients. Numbers are rounded once (2⁻⁹), the norm's twice;
    a gradient's error is that of sums of rounded numbers."""
    lengths = (67, 130, 5)
    heads = [values(sum(lengths), count, 16, seed=i) for i, count in enumerate((4, 2, 2))]
    angles = values(37, 6, seed=2)
    cases: list[tuple[Any, list[Tensor], str]] = [
        (_with(rms_norm, 1e-3), [values(37, 50), values(50, seed=1)], "fused"),
        (swiglu, [3 * values(37, 50), values(37, 50, seed=1)], "fused"),
        (rope, [values(37, 5, 12, seed=3), angles.cos(), angles.sin()], "reference"),
        (_with(attention, lengths, scale=0.25), heads, "sdpa"),
        (_with(attention, lengths, scale=0.25, window=40, shared=(0, 31, 0)), heads, "sdpa"),
    ]
    for compute, inputs, peer in cases:
        inputs = [x.bfloat16() for x in inputs]
        angle_count = 2 if compute is rope else 0
        errors: dict[str, list[float]] = {}
        exact: list[Tensor] = []
        for names, dtype in (("reference", torch.float64), ("cpu", torch.bfloat16), (peer, torch.bfloat16)):
            with pinned(names):
                given_ = [x.to(dtype).requires_grad_(i < len(inputs) - angle_count) for i, x in enumerate(inputs)]
                y = compute(*given_)
                slope = values(*y.shape, seed=99).bfloat16().to(dtype)
                found = [y, *torch.autograd.grad(y, given_[: len(inputs) - angle_count], slope)]
            assert all(one.dtype == dtype for one in found)
            exact = exact or found
            errors[f"{names} {dtype}"] = [
                float(((one.double() - true).abs().max() / true.abs().max()).detach())
                for one, true in zip(found, exact, strict=True)
            ]
        ours, theirs = errors["cpu torch.bfloat16"], errors[f"{peer} torch.bfloat16"]
        assert all(one <= other for one, other in zip(ours, theirs, strict=True)), (ours, theirs)
        assert max(ours) < 2.0**-8


def test_layers_in_bfloat16_err_less_than_torchs_operations() -> None:
    """As above, of linear layers with low ranks over each way to hold a matrix; where the processor has no tiles of
    bfloat16, they are torch's operations."""
    tokens, inputs, outputs = 77, 64, (96, 32, 33)
    dense = [values(out, inputs, seed=out) for out in outputs]
    blocks = torch.empty(96, inputs // 32 * 20, dtype=torch.uint8)
    weights: list[Callable[[torch.dtype], list[Any]]] = [
        lambda dtype: [DenseWeight(one.bfloat16().to(dtype)) for one in dense],
        lambda dtype: [nf4.scheme("").weight(one, dtype) for one in dense],
        lambda dtype: [GgufWeight(blocks, "q4_1", dtype).replace_dense(dense[0])],
    ]
    for made in weights:
        count = len(made(torch.float32))
        x = values(tokens, inputs, seed=7).bfloat16()
        lows = [(values(5, inputs, seed=8), values(out, 5, seed=9)) for out in outputs[:count]]
        slopes = [values(tokens, out, seed=10).bfloat16() for out in outputs[:count]]
        errors: dict[str, list[float]] = {}
        exact: list[Tensor] = []
        for names, dtype in (("reference", torch.float64), ("cpu,fused", torch.bfloat16), ("fused", torch.bfloat16)):
            with pinned(names):
                given_ = x.to(dtype).requires_grad_()
                pairs = [[one.to(max(dtype, torch.float32, key=lambda d: d.itemsize)) for one in low] for low in lows]
                trained = [one.requires_grad_() for pair in pairs for one in pair]
                held = [weight.train() for weight in made(dtype)]
                ys = lora_linears(given_, held, [(a, b, 0.7) for a, b in pairs])
                loss = sum((y * slope.to(dtype)).sum() for y, slope in zip(ys, slopes, strict=True))
                found = [*ys, *torch.autograd.grad(loss, [given_, *trained])]
            assert all(one.dtype == dtype for one in found[: count + 1])
            assert all(one.dtype in (torch.float32, torch.float64) for one in found[count + 1 :])
            exact = exact or found
            errors[names] = [
                float(((one.double() - true).abs().max() / true.abs().max()).detach())
                for one, true in zip(found, exact, strict=True)
            ]
        # A and B are rounded, too, and so is what lies between them
        assert max(errors["cpu,fused"]) < 2.0**-6, errors
        if _core.multiplies_bfloat16():
            pairs_of = list(zip(errors["cpu,fused"], errors["fused"], strict=True))
            assert all(one <= other for one, other in pairs_of[count:]), errors
            # of y most is the rounding of A and B, which both have: which of them has the largest error is chance
            assert all(one <= 1.5 * other for one, other in pairs_of[:count]), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_scores(dtype: torch.dtype) -> None:
    logits = (values(37, 1003) * 9).to(dtype)
    logits[3, 5], logits[4] = 300.0, -1e30  # one certain, all equal
    targets = torch.arange(37) * 26
    targets[3] = 5
    exact, slope = cross_entropy.reference(logits.double(), targets, gradient=True)
    assert slope is not None
    losses, found = cross_entropy(logits, targets, gradient=True)
    assert found is not None
    assert (found.dtype, losses.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=2e-6)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found.double(), slope, rtol=rounding, atol=1e-6)
    with torch.no_grad():
        alone, none = cross_entropy(logits, targets)
    assert none is None
    assert torch.equal(alone, losses)
    with pinned("reference"):
        torch.testing.assert_close(cross_entropy(logits, targets)[0], losses, rtol=1e-5, atol=1e-5)
    nan = logits.clone()
    nan[7, 9] = float("nan")
    losses, found = cross_entropy(nan, targets, gradient=True)
    assert losses.isnan().nonzero().flatten().tolist() == [7]
    assert found is not None
    assert found[7].isnan().all()
    targets[2] = 1003
    with pytest.raises(FtkitError, match="below 1003, got 1003"):
        cross_entropy(logits, targets, gradient=True)


def _with(operation: Any, *more: Any, **named: Any) -> Any:
    def function(*inputs: Tensor) -> Any:
        return operation(*inputs, *more, **named)

    function.reference = lambda *inputs: operation.reference(*inputs, *more, **named)  # type: ignore[attr-defined]
    return function


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield _core.set_threads
    _core.set_threads(torch.get_num_threads())


def test_threads_change_no_bit(threads: Callable[[int], None]) -> None:
    inputs = [values(300, count, 32, seed=i).requires_grad_() for i, count in enumerate((6, 3, 3))]
    x, a, b = (values(*shape, seed=5).requires_grad_() for shape in ((300, 192), (8, 192), (320, 8)))
    weight = DenseWeight(values(320, 192, seed=6))
    found = []
    for count in (1, 2, 3):
        threads(count)
        attended = attention(*inputs, (170, 130), scale=1 / math.sqrt(32))
        (y,) = lora_linears(x, [weight], [(a, b, 2.0)])
        loss = attended.square().sum() + y.square().sum()
        found.append([attended, y, *torch.autograd.grad(loss, [*inputs, x, a, b])])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
