"""Attention over pages is attention: whatever the pages, and whoever else is in the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ftkit.kernels.attention import attention
from ftkit.kernels.paged_attention import FEW, paged_attention

pytestmark = pytest.mark.unit

LAYERS, BLOCK, HEADS, KV_HEADS, DIM = 3, 5, 6, 2, 7


class Filled:
    """Sequences with `before` tokens in pages and `new` ones to attend from; also as dense tensors."""

    def __init__(self, sequences: list[tuple[int, int]], layer: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = tuple(new for _, new in sequences)
        self.totals = tuple(before + new for before, new in sequences)
        blocks = [-(-total // BLOCK) for total in self.totals]
        order = torch.randperm(sum(blocks) + 2, generator=generator).tolist()
        self.pages = torch.full((sum(blocks) + 2, LAYERS, 2, BLOCK, KV_HEADS, DIM), float("nan"), dtype=dtype)
        self.table = torch.zeros(len(sequences), max(blocks), dtype=torch.int32)
        self.q, self.k, self.v = [], [], []
        for row, total in enumerate(self.totals):
            q, k, v = (torch.randn(total, n, DIM, generator=generator).to(dtype) for n in (HEADS, KV_HEADS, KV_HEADS))
            self.q.append(q), self.k.append(k), self.v.append(v)
            for position in range(total):
                if position % BLOCK == 0:
                    self.table[row, position // BLOCK] = order.pop()
                page = self.table[row, position // BLOCK]
                self.pages[page, layer, 0, position % BLOCK] = k[position]
                self.pages[page, layer, 1, position % BLOCK] = v[position]
        self.new = torch.cat(
            [q[total - new :] for q, total, new in zip(self.q, self.totals, self.lengths, strict=True)]
        )
        self.positions = torch.tensor([p for b, n in sequences for p in range(b, b + n)], dtype=torch.int32)
        self.cu = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32)
        self.layer = layer

    def run(self, operation: object, window: int | None, rows: slice = slice(None)) -> Tensor:
        first, last, _ = rows.indices(len(self.lengths))
        begin, end = int(self.cu[first]), int(self.cu[last])
        return operation(  # type: ignore[operator, no-any-return]
            self.new[begin:end],
            self.pages,
            self.table[first:last],
            self.cu[first : last + 1] - begin,
            self.positions[begin:end],
            self.lengths[first:last],
            self.totals[first:last],
            layer=self.layer,
            scale=0.3,
            window=window,
        )


SEQUENCES = st.lists(st.tuples(st.integers(0, 23), st.integers(1, 9)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(0, LAYERS - 1), st.none() | st.integers(1, 11), st.integers(0, 2**31))
def test_it_is_attention_over_the_whole_sequences(
    sequences: list[tuple[int, int]], layer: int, window: int | None, seed: int
) -> None:
    filled = Filled(sequences, layer, torch.float32, seed)
    whole = attention.reference(
        torch.cat(filled.q), torch.cat(filled.k), torch.cat(filled.v), filled.totals, scale=0.3, window=window
    ).split(filled.totals)
    expected = torch.cat([y[total - new :] for y, total, new in zip(whole, filled.totals, filled.lengths, strict=True)])
    for operation in (paged_attention.reference, paged_attention):
        torch.testing.assert_close(filled.run(operation, window), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(SEQUENCES, st.none() | st.integers(1, 11), st.integers(0, 2**31))
def test_bfloat16_pages(sequences: list[tuple[int, int]], window: int | None, seed: int) -> None:
    filled = Filled([(before, min(new, FEW)) for before, new in sequences], 1, torch.bfloat16, seed)
    wide = Filled([(before, min(new, FEW)) for before, new in sequences], 1, torch.bfloat16, seed)
    wide.new, wide.pages = wide.new.float(), wide.pages.float()
    # Sums are in float32: only the result is rounded.
    expected = wide.run(paged_attention.reference, window)
    torch.testing.assert_close(filled.run(paged_attention, window).float(), expected, rtol=2**-7, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(SEQUENCES, st.integers(0, 2**31))
def test_a_sequence_alone_has_the_same_bits(sequences: list[tuple[int, int]], seed: int) -> None:
    filled = Filled(sequences, 0, torch.float32, seed)
    together = filled.run(paged_attention, None).split(filled.lengths)
    for index, expected in enumerate(together):
        assert torch.equal(filled.run(paged_attention, None, slice(index, index + 1)), expected)


def test_many_rows_on_many_threads_have_the_same_bits_as_one() -> None:
    filled = Filled([(200, 1)] * 40, 2, torch.float32, 5)
    together = filled.run(paged_attention, None)
    for index in range(40):
        assert torch.equal(filled.run(paged_attention, None, slice(index, index + 1))[0], together[index])


def test_it_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        q, pages = torch.empty(3, HEADS, DIM), torch.empty(4, LAYERS, 2, BLOCK, KV_HEADS, DIM)
        table, cu = torch.empty(3, 2, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
        positions = torch.empty(3, dtype=torch.int32)
        out = paged_attention(q, pages, table, cu, positions, (1, 1, 1), (4, 4, 4), layer=0, scale=1.0)
    assert out.shape == q.shape
