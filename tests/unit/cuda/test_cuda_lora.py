"""Several adapters' low-rank matrices on their rows of a stream, in the emulator: kernels over a pool's pages."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.cuda.emulated import Kit, close, normal
from torch._subclasses.fake_tensor import FakeTensorMode

from ftkit.cuda import lora
from ftkit.cuda.on_cpu import SCHEDULES
from ftkit.errors import InputError
from ftkit.kernels import _gpu, pinned
from ftkit.kernels.lora_rows import lora_rows
from ftkit.nn.routes import Routes

pytestmark = pytest.mark.unit

BF16, F32 = torch.bfloat16, torch.float32
PAGE = 8192
"""Values of a page of the pools here."""


def pool_of(matrices: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(pool, places) of matrices on pages of a pool, the second one on the last page, and nothing after its end."""
    count = len(matrices)
    pool, places = torch.full((count * PAGE,), torch.nan), []
    for number, one in enumerate(matrices):
        at = (number - 2) % count * PAGE + number % 3 * 16
        pool[at : at + one.numel()] = one.flatten()
        places.append(at)
    end = max(at + one.numel() for at, one in zip(places, matrices, strict=True))
    return pool[:end].clone(), torch.tensor(places)


class Adapters:
    """Adapters of these ranks for a layer of in → out, in pages of float32, and rows under them."""

    def __init__(self, ranks: list[int], shape: tuple[int, int], spans: list[tuple[int, int]], dtype=BF16) -> None:
        columns, out = shape
        self.a = [normal(rank, columns, seed=10 + i, dtype=F32) / columns**0.5 for i, rank in enumerate(ranks)]
        self.b = [normal(out, rank, seed=20 + i, dtype=F32) for i, rank in enumerate(ranks)]
        self.factors = torch.linspace(0.5, 2, len(ranks))
        self.spans, self.dtype = spans, dtype
        self.rows = sum(length for _, length in spans)
        self.x = normal(self.rows, columns, dtype=dtype)
        self.y = normal(self.rows, out, seed=3, dtype=dtype)
        self.segments = lora.Segments(
            ends=torch.tensor([0, *(length for _, length in spans)]).cumsum(0).int(),
            adapters=torch.tensor([adapter for adapter, _ in spans], dtype=torch.int32),
        )
        self.ranks = torch.tensor(ranks, dtype=torch.int32)
        self.width = -(-max(ranks) // 16) * 16

    def matrices(self, which: list[torch.Tensor]) -> lora.Matrices:
        pool, places = pool_of(which)
        return lora.Matrices(pool=pool, places=places, ranks=self.ranks, width=self.width)

    def of_rows(self) -> list[int]:
        return [adapter for adapter, length in self.spans for _ in range(length)]


def check(kit: Kit, made: Adapters, tiles: bool, schedule: int) -> torch.Tensor:
    """Both kernels against sums in float64, row by row; y."""
    launch = kit.launcher(schedule)
    low = lora.shrink(launch, made.x, made.matrices(made.a), made.factors, made.segments, tiles)
    y = made.y.clone()
    lora.expand(launch, low, made.matrices(made.b), made.segments, y, tiles)
    for row, adapter in enumerate(made.of_rows()):
        if adapter < 0:
            assert torch.equal(y[row], made.y[row]), "nobody's row stays"
            continue
        a, b = (one[adapter].to(made.dtype).double() for one in (made.a, made.b))
        x, rank, factor = made.x[row].double(), len(a), float(made.factors[adapter])
        close(low[row, :rank], factor * (a @ x), factor * (a.abs() @ x.abs()))
        if tiles:
            assert not low[row, rank : -(-rank // 16) * 16].any()
        own = low[row, :rank].double()
        before = made.y[row].double()
        close(y[row], before + b @ own, before.abs() + b.abs() @ own.abs())
    return y


# an empty segment, nobody's rows, one row, more than a piece, an adapter twice and one that no row has
SPANS = [(1, 3), (0, 0), (-1, 2), (2, 37), (1, 1), (0, 2), (1, 32)]
RANKS = [16, 3, 20, 5]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(48, 12), (528, 132)])
def test_segments_of_many_rows(kit: Kit, shape: tuple[int, int], schedule: int) -> None:
    if shape[0] < 100:
        check(kit, Adapters(RANKS, shape, SPANS), True, schedule)
    else:
        check(kit, Adapters([4, 7], shape, [(1, 2), (0, 3)]), True, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rows_by_themselves(kit: Kit, dtype: torch.dtype, schedule: int) -> None:
    check(kit, Adapters(RANKS, (264, 67), [(1, 1), (0, 0), (-1, 1), (2, 2), (3, 1)], dtype), False, schedule)


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 40)), min_size=1, max_size=6),
    st.lists(st.integers(0, 18), min_size=4, max_size=4).filter(any),
    st.booleans(),
    st.sampled_from(SCHEDULES),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_segments_and_ranks(
    kit: Kit, spans: list[tuple[int, int]], ranks: list[int], tiles: bool, schedule: int
) -> None:
    check(kit, Adapters(ranks, (16, 8), spans), tiles, schedule)


@pytest.mark.parametrize("tiles", [True, False])
def test_a_row_does_not_depend_on_its_neighbours_adapters(kit: Kit, tiles: bool) -> None:
    """The bits of a row are those that it has alone under its adapter."""
    made = Adapters(RANKS, (48, 12), SPANS)
    y = check(kit, made, tiles, 0)
    adapters = made.of_rows()
    for row in (0, 5, 44, 60):
        alone = Adapters(RANKS, (48, 12), [(adapters[row], 1)])
        alone.x, alone.y = made.x[row : row + 1].clone(), made.y[row : row + 1].clone()
        assert torch.equal(check(kit, alone, tiles, 1)[0], y[row])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient(kit: Kit, schedule: int) -> None:
    """Σ lowᵀ x of each adapter, zeros for one without rows and beyond its rank."""
    spans = [(1, 3), (0, 0), (-1, 2), (2, 140), (1, 18)]
    made = Adapters([16, 3, 20, 5], (36, 12), spans)
    low = normal(made.rows, 32, seed=5)
    found = lora.gradient(kit.launcher(schedule), low, made.x, made.ranks, made.segments)
    rows = torch.tensor(made.of_rows())
    for adapter, rank in enumerate(made.ranks.tolist()):
        left, right = low[rows == adapter, :rank].double(), made.x[rows == adapter].double()
        close(found[adapter, :rank], left.T @ right, left.abs().T @ right.abs())
        assert not found[adapter, rank:].any()


def test_a_gradient_does_not_depend_on_others_rows(kit: Kit) -> None:
    """To the bit, wherever an adapter's segments are and however blocks run."""
    low, x = normal(60, 16, seed=5), normal(60, 36)
    ranks = torch.tensor([16, 16], dtype=torch.int32)

    def of(rows: list[int], spans: list[tuple[int, int]], schedule: int) -> torch.Tensor:
        ends = torch.tensor([0, *(length for _, length in spans)]).cumsum(0).int()
        segments = lora.Segments(ends=ends, adapters=torch.tensor([one for one, _ in spans], dtype=torch.int32))
        return lora.gradient(kit.launcher(schedule), low[rows], x[rows], ranks, segments)[0]

    alone = of([*range(20), *range(30, 53)], [(0, 20), (0, 23)], 0)
    among = of(list(range(60)), [(0, 20), (1, 10), (0, 23), (-1, 7)], 2)
    assert torch.equal(alone, among)


def test_nothing_is_launched_for_no_rows_or_ranks() -> None:
    def launch(*_: object) -> None:
        raise AssertionError("expected no launch")

    made = Adapters([4], (16, 8), [(0, 0)])
    low = lora.shrink(launch, made.x, made.matrices(made.a), made.factors, made.segments)
    lora.expand(launch, low, made.matrices(made.b), made.segments, made.y)
    assert lora.gradient(launch, low, made.x, made.ranks, made.segments).shape == (1, 16, 16)
    nothing = Adapters([0], (16, 8), [(0, 3)])
    low = lora.shrink(launch, nothing.x, nothing.matrices(nothing.a), nothing.factors, nothing.segments)
    lora.expand(launch, low, nothing.matrices(nothing.b), nothing.segments, nothing.y)
    assert not lora.gradient(launch, low, nothing.x, nothing.ranks, nothing.segments).numel()


def loras_of(made: Adapters, where: str) -> dict[int, tuple[torch.Tensor, torch.Tensor, float]]:
    """The adapters under numbers of a server's, in a pool's pages or each in memory of its own."""
    found = {}
    pool = [pool_of(one) for one in (made.a, made.b)]
    for number, (a, b) in enumerate(zip(made.a, made.b, strict=True)):
        if where == "pages":
            views = ((*one, m) for one, m in zip(pool, (a, b), strict=True))
            a, b = (memory[places[number] :][: m.numel()].view(m.shape) for memory, places, m in views)
        found[100 + number] = (a, b, float(made.factors[number]))
    return found


@pytest.mark.parametrize("where", ["pages", "apart"])
@pytest.mark.parametrize("spans", [SPANS, [(1, 1), (-1, 1), (3, 1), (1, 2)]], ids=["prompts", "decoding"])
def test_the_operation_is_its_reference(gpu: list[str], where: str, spans: list[tuple[int, int]]) -> None:
    made = Adapters(RANKS, (48, 16), spans)
    routes = Routes.of_sequences([n for _, n in spans], [-1 if one < 0 else 100 + one for one, _ in spans])
    loras = loras_of(made, where)
    expected = lora_rows.reference(made.y.double(), made.x.double(), loras, routes)
    with torch.no_grad():
        found = lora_rows(made.y, made.x, loras, routes)
    assert found is made.y or found.data_ptr() == made.y.data_ptr(), "in place"
    assert (found.double() - expected).norm() / expected.norm() < 1e-2
    few = len(spans) == 4
    assert gpu == (["lora_bgmv_shrink", "lora_bgmv_expand"] if few else ["lora_sgmv_shrink", "lora_sgmv_expand"])


def test_gradients_are_the_references(gpu: list[str]) -> None:
    """Of y, x and every adapter's matrices, those without rows among them."""
    made = Adapters(RANKS, (48, 16), SPANS)
    routes = Routes.of_sequences([n for _, n in SPANS], [one for one, _ in SPANS])
    leaves = [one.requires_grad_() for one in (made.y, made.x, *made.a, *made.b)]

    def run(operation, dtype: torch.dtype):
        y, x, *rest = (one.to(dtype) for one in leaves)
        a, b = rest[: len(RANKS)], rest[len(RANKS) :]
        loras = {number: (a[number], b[number], float(made.factors[number])) for number in range(len(RANKS))}
        found = operation(y * 1, x, loras, routes)
        slope = normal(*found.shape, seed=9).to(dtype)
        return found, torch.autograd.grad(found, leaves, slope, allow_unused=True)

    y, found = run(lora_rows, BF16)
    assert gpu == [
        *("lora_sgmv_shrink", "lora_sgmv_expand"),
        *("lora_sgmv_shrink", "lora_sgmv_expand", "lora_gradient", "lora_sgmv_shrink", "lora_gradient"),
    ]
    expected_y, expected = run(lora_rows.reference, torch.float64)
    for one, other in zip((y, *found), (expected_y, *expected), strict=True):
        if other is None:
            assert one is None or not one.any(), "no rows, no gradient"
        else:
            assert one is not None
            assert (one.double() - other).norm() <= 2e-2 * other.norm()


def test_what_kernels_do_not_take_is_the_references(gpu: list[str]) -> None:
    """Sides that are no sixteens, matrices of two types, float32 with gradients: the same numbers by torch."""
    for shape, change in (((40, 16), None), ((48, 12), None), ((48, 16), "type")):
        made = Adapters([4, 3], shape, [(0, 2), (1, 2)])
        routes, loras = Routes.of_sequences([2, 2], [0, 1]), {}
        for number, (a, b) in enumerate(zip(made.a, made.b, strict=True)):
            loras[number] = (a.bfloat16() if change and number else a, b, 1.0)
        with torch.no_grad():
            expected = lora_rows.reference(made.y.clone(), made.x, loras, routes)
            assert torch.equal(lora_rows(made.y.clone(), made.x, loras, routes), expected)
    assert not gpu
    made = Adapters([4, 3], (48, 16), [(0, 2), (1, 2)], F32)
    loras = {number: (a.requires_grad_(), b, 1.0) for number, (a, b) in enumerate(zip(made.a, made.b, strict=True))}
    lora_rows(made.y, made.x, loras, Routes.of_sequences([2, 2], [0, 1]))
    assert not gpu


def test_a_plan_sees_what_is_allocated() -> None:
    with FakeTensorMode(), pinned("cuda"), _gpu.foreseen():
        x, y = (torch.empty(20, side, dtype=BF16, requires_grad=True) for side in (48, 32))
        a, b = torch.empty(4, 48, requires_grad=True), torch.empty(32, 4, requires_grad=True)
        loras = {3: (a, b, 1.0), 4: (a, b, 1.0)}
        out = lora_rows(y * 1, x, loras, Routes.of_sequences([10, 10], [3, 4]))
        out.sum().backward()
        assert (out.shape, x.grad is not None, a.grad is not None) == ((20, 32), True, True)


def test_bad_arguments_are_named(kit: Kit) -> None:
    made = Adapters([4], (48, 16), [(0, 3)])
    launch, matrices = kit.launcher(), made.matrices(made.a)

    def shrink(x: torch.Tensor = made.x, **changed: torch.Tensor) -> None:
        segments = dataclasses.replace(made.segments, **{k: v for k, v in changed.items() if k in ("ends", "adapters")})
        others = {k: v for k, v in changed.items() if k in ("pool", "places", "ranks")}
        lora.shrink(launch, x, dataclasses.replace(matrices, **others), made.factors, segments, tiles=True)

    with pytest.raises(InputError, match=r"lora_sgmv_shrink: x: expected torch.bfloat16, got torch.float16"):
        shrink(made.x.half())
    with pytest.raises(InputError, match=r"lora_sgmv_shrink: x: expected a contiguous tensor, got strides \(1, 3\)"):
        shrink(made.x.T.contiguous().T)
    with pytest.raises(InputError, match=r"places: expected torch.int64, got torch.int32"):
        shrink(places=matrices.places.int())
    with pytest.raises(InputError, match=r"ends: expected torch.int32, got torch.int64"):
        shrink(ends=made.segments.ends.long())
    with pytest.raises(InputError, match=r"lora_sgmv_shrink: expected tensors on one cpu device, got cpu, meta"):
        shrink(adapters=made.segments.adapters.to("meta"))
    with pytest.raises(InputError, match=r"lora_shrink: ends: expected the shape \[2\], got \[3\]"):
        shrink(ends=torch.tensor([0, 1, 3]).int())
    with pytest.raises(InputError, match=r"lora_shrink: places: expected the shape \[1\], got \[2\]"):
        shrink(places=torch.tensor([0, 0]))
    with pytest.raises(InputError, match=r"lora_shrink: x: expected a multiple of 16 columns, got 40"):
        shrink(normal(3, 40))
    low = normal(3, 16)
    with pytest.raises(InputError, match=r"lora_expand: low: expected the shape \[2, 16\], got \[3, 16\]"):
        lora.expand(launch, low, matrices, made.segments, made.y[:2])
    with pytest.raises(InputError, match=r"lora_expand: into: expected a multiple of 4 columns, got 6"):
        lora.expand(launch, low, matrices, made.segments, normal(3, 6), tiles=True)
    with pytest.raises(InputError, match=r"lora_gradient: low: expected the shape \[4, 16\], got \[3, 16\]"):
        lora.gradient(launch, low, normal(4, 16), made.ranks, made.segments)
    with pytest.raises(InputError, match=r"low of a multiple of 16 columns and x of 4, got 16 and 6"):
        lora.gradient(launch, low, normal(3, 6), made.ranks, made.segments)
