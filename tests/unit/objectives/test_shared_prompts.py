"""A pair's prompt is computed once: losses and gradients are those of both answers apart.

In float64, where sums in another order differ by rounding alone: some 1e-15 a sum, of thousands of terms with gradients
of very different sizes, so 1e-9 of a gradient's largest entry is far above it and far below any mistake.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny_models
from ftkit import adapters, plugins
from ftkit.kernels.attention import attention
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder

pytestmark = pytest.mark.unit

sizes = st.lists(st.tuples(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=3)))


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sizes.filter(bool), st.none() | st.integers(1, 7), st.sampled_from([attention, attention.reference]))
@settings(max_examples=40, deadline=None)
def test_attention_is_that_of_whole_sequences(
    trees: list[tuple[int, list[tuple[int, int]]]], window: int | None, function: Callable[..., Tensor]
) -> None:
    lengths: list[int] = []
    shared: list[int] = []
    places: list[int] = []  # of the whole sequences' tokens in the stream
    own: list[bool] = []
    for first, others in trees:
        begin = sum(lengths)
        for count, alike in [(first, 0), *((count, min(alike, first)) for count, alike in others)]:
            places += [*range(begin, begin + alike), *range(sum(lengths), sum(lengths) + count)]
            own += [False] * alike + [True] * count
            lengths.append(count)
            shared.append(alike)
    q, k, v = (values(sum(lengths), heads, 5, seed=heads).requires_grad_() for heads in (6, 3, 3))
    whole = tuple(a + b for a, b in zip(lengths, shared, strict=True))
    ours = function(q, k, v, tuple(lengths), scale=0.4, window=window, shared=tuple(shared))
    expected = attention.reference(q[places], k[places], v[places], whole, scale=0.4, window=window)[own]
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    slope = values(*ours.shape, seed=7)
    for one, other in zip(*(torch.autograd.grad(y, (q, k, v), slope) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def prompt(length: int, seed: int) -> list[int]:
    return [(7 * i * seed + 3 * i * i + seed) % 97 for i in range(length)]


PAIRS = [(prompt(21, 2), prompt(5, 3), prompt(8, 5)), (prompt(3, 7), prompt(9, 4), prompt(1, 9)), ([4], [5], [6, 7])]


def batches() -> tuple[RaggedBatch, RaggedBatch]:
    """Pairs as they are, and with each prompt once."""
    rows, targets, short, short_targets, shared = [], [], [], [], []
    for x, chosen, rejected in PAIRS:
        for answer, alike in ((chosen, 0), (rejected, len(x) - 1)):
            row, target = [*x, *answer], [-100] * (len(x) - 1) + answer + [-100]
            rows.append(row)
            targets.append(target)
            short.append(row[alike:])
            short_targets.append(target[alike:])
            shared.append(alike)
    group = [0, 0, 1, 1, 2, 2]
    whole = RaggedBatch.pack(rows, targets=targets, adapter=0, group=group)
    return whole, RaggedBatch.pack(short, targets=short_targets, adapter=0, group=group, shared=shared)


def disturb(model: Decoder) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3 windows"])
@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_losses_and_gradients_are_those_of_both_answers_apart(tmp_path: Path, variant: str, name: str) -> None:
    model = tiny_models.ours(tiny_models.peer(variant), tmp_path / "model").model
    adapters.attach(model, "lora", {}, seed=1)
    disturb(model)
    model.train()
    objective = plugins.load("objectives", name)
    whole, once = batches()
    assert once.tokens.numel() == whole.tokens.numel() - 20 - 2 - 0
    found = []
    for batch, recompute in ((whole, False), (once, False), (once, True)):
        model.recomputed_layers = len(model.layers) if recompute else 0
        parts = objective.loss(model, batch, objective.Config())
        found.append((parts, torch.autograd.grad(parts.sum.sum(), list(adapters.trainable(model).values()))))
    cut = [objective.loss(model, part, objective.Config()).sum for part in once.cut(2)]
    assert len(cut) == 2
    torch.testing.assert_close(sum(cut), found[0][0].sum, rtol=1e-11, atol=0)
    (expected, slopes), *others = found
    for parts, ours in others:
        torch.testing.assert_close(parts.sum, expected.sum, rtol=1e-11, atol=0)
        for metric, value in expected.metrics.items():
            torch.testing.assert_close(parts.metrics[metric], value, rtol=1e-9, atol=1e-11)
        for one, other in zip(ours, slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * float(other.abs().max()))
