"""Attention of prompts and their chunks over pages, in the emulator."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.cuda.emulated import Kit, normal

from ftkit.cuda import pages as launches
from ftkit.cuda.on_cpu import SCHEDULES
from ftkit.errors import InputError
from ftkit.kernels import _gpu, pinned
from ftkit.kernels.paged_attention import paged_attention

pytestmark = pytest.mark.unit

BF16 = torch.bfloat16
LAYER = 1


class Prompts:
    """Sequences of so many tokens, the last of which are new, on pages in no order; what nobody may read is NaN."""

    def __init__(
        self,
        size: int,
        totals: tuple[int, ...],
        lengths: tuple[int, ...],
        heads: tuple[int, int] = (4, 2),
        block: int = 4,
    ) -> None:
        self.totals, self.lengths = totals, lengths
        counts = [-(-total // block) for total in totals]
        order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(2)).int()
        self.pages = torch.full((len(order), 2, 2, block, heads[1], size), torch.nan, dtype=BF16)
        self.table = torch.zeros(len(totals), max(*counts, 1), dtype=torch.int32)
        used = 0
        for sequence, (total, count) in enumerate(zip(totals, counts, strict=True)):
            self.table[sequence, :count] = order[used : used + count]
            for place in range(total):
                page = int(self.table[sequence, place // block])
                self.pages[page, LAYER, :, place % block] = normal(2, heads[1], size, seed=1000 * sequence + place)
            used += count
        self.positions = torch.cat([torch.arange(t - n, t) for t, n in zip(totals, lengths, strict=True)]).int()
        self.ends = torch.tensor([0, *lengths]).cumsum(0).int()
        self.q = normal(sum(lengths), heads[0], size, seed=3)
        self.scale = size**-0.5

    def forget_before(self, window: int) -> None:
        """What no new token's window reaches is another's."""
        block = self.pages.shape[3]
        for sequence, (total, length) in enumerate(zip(self.totals, self.lengths, strict=True)):
            for place in range(max(0, total - length - window + 1)):
                self.pages[int(self.table[sequence, place // block]), LAYER, :, place % block] = torch.nan

    def run(self, kit: Kit, schedule: int, window: int | None = None) -> torch.Tensor:
        batch = (self.q, self.pages, self.table, self.ends, self.positions)
        return launches.paged_prefill(kit.launcher(schedule), *batch, LAYER, self.scale, window)

    def expected(self, window: int | None = None) -> torch.Tensor:
        wide = (self.q.double(), self.pages.double().nan_to_num(), self.table, self.ends, self.positions)
        options = {"layer": LAYER, "scale": self.scale, "window": window}
        return paged_attention.reference(*wide, self.lengths, self.totals, **options)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Weights are rounded to bfloat16, as is the result: of values of about 1, a few units of its precision."""
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=1.2e-2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("size", "window"), [(64, None), (80, 7), (96, 40), (128, None)])
def test_prompts_and_chunks(kit: Kit, size: int, window: int | None, schedule: int) -> None:
    """One token, whole prompts, an empty sequence, and a chunk in the midst of a page and of a step."""
    made = Prompts(size, (1, 70, 0, 101), (1, 70, 0, 34))
    if window:
        made.forget_before(window)
    near(made.run(kit, schedule, window), made.expected(window))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_short_prompt_and_a_chunk(kit: Kit, schedule: int) -> None:
    made = Prompts(80, (18, 39), (18, 4))
    made.forget_before(9)
    near(made.run(kit, schedule, 9), made.expected(9))


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (6, 2), (3, 3)]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from([None, 1, 33]),
    st.sampled_from(SCHEDULES),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lengths_heads_and_pages(
    kit: Kit, spans: list[tuple[int, int]], heads: tuple[int, int], block: int, window: int | None, schedule: int
) -> None:
    """(tokens before, new tokens) of each sequence."""
    if not any(new for _, new in spans):
        spans = [*spans, (0, 1)]
    made = Prompts(64, tuple(a + b for a, b in spans), tuple(b for _, b in spans), heads, block)
    near(made.run(kit, schedule, window), made.expected(window))


@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_in_chunks_has_the_bits_of_one(kit: Kit, window: int | None) -> None:
    """Alone, in chunks of any sizes, and beside others."""
    whole = Prompts(64, (90,), (90,))
    y = whole.run(kit, 0, window)
    for first, last in ((0, 50), (50, 51), (51, 90)):
        chunk = Prompts(64, (90,), (90,))
        chunk.q, chunk.positions = whole.q[first:last].contiguous(), whole.positions[first:last]
        chunk.ends = torch.tensor([0, last - first], dtype=torch.int32)
        assert torch.equal(chunk.run(kit, 1, window), y[first:last])


def test_great_scores_do_not_overflow(kit: Kit) -> None:
    made = Prompts(64, (40,), (40,))
    made.q *= 300
    near(made.run(kit, 0), made.expected())


def test_what_the_kernel_takes() -> None:
    made = Prompts(64, (3,), (3,))
    assert launches.takes_prefill(made.q, made.pages)
    assert not launches.takes_prefill(made.q.float(), made.pages.float()), "bfloat16 alone"
    assert not launches.takes_prefill(normal(3, 4, 72), normal(2, 2, 2, 4, 2, 72)), "heads of 72"
    assert not launches.takes_prefill(made.q, made.pages.transpose(3, 4)), "strides"
    assert not launches.takes_prefill(normal(3 * 4 * 64 + 1)[1:].view(3, 4, 64), made.pages), "not aligned"


def test_bad_arguments_are_named(kit: Kit) -> None:
    made = Prompts(64, (3,), (3,))
    made.table = made.table.long()
    with pytest.raises(InputError, match=r"paged_prefill: block_table: expected torch.int32, got torch.int64"):
        made.run(kit, 0)
    made = Prompts(64, (3,), (3,))
    made.q = made.q.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(InputError, match=r"paged_prefill: q: expected a contiguous tensor, got strides"):
        made.run(kit, 0)
    for change, message in (
        ({"q": normal(3, 4, 128)}, r"q: expected the shape \[3, 4, 64\], got \[3, 4, 128\]"),
        ({"q": normal(3, 3, 64)}, r"expected heads that are a multiple of 2 and a layer below 2, got 3 heads"),
        ({"ends": torch.tensor([0, 1, 3]).int()}, r"cu_seqlens: expected the shape \[2\], got \[3\]"),
        ({"positions": torch.tensor([0]).int()}, r"positions: expected the shape \[3\], got \[1\]"),
    ):
        made = Prompts(64, (3,), (3,))
        vars(made).update(change)
        with pytest.raises(InputError, match="paged_prefill: " + message):
            made.run(kit, 0)


def test_nothing_is_launched_for_no_tokens() -> None:
    made = Prompts(64, (3,), (0,))
    batch = (made.q, made.pages, made.table, made.ends, made.positions)
    assert not launches.paged_prefill(lambda *_: pytest.fail("a launch"), *batch, 1, 1.0, None).numel()


@pytest.mark.parametrize("size", [64, 80])
def test_prompts_beside_single_tokens(gpu: list[str], size: int) -> None:
    """Each kernel takes its part of a batch; a head that one doesn't know is the other's."""
    made = Prompts(size, (9, 33, 20), (1, 33, 7))
    batch = (made.q, made.pages, made.table, made.ends, made.positions, made.lengths, made.totals)
    with torch.library._scoped_library("ftkit", "IMPL") as library:
        library.impl("paged_attention", _gpu.runs["paged_attention"], "CPU", allow_override=True)
        near(paged_attention(*batch, layer=LAYER, scale=made.scale), made.expected())
    assert gpu == (["paged_attention", "paged_prefill"] if size == 64 else ["paged_prefill"] * 2)
    with pinned("reference"):
        made.pages.nan_to_num_()
        near(paged_attention(*batch, layer=LAYER, scale=made.scale), made.expected())
    assert len(gpu) == 2
