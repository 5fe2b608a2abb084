"""Each kernel gives what its CPU twin gives, under every schedule, at the edges of its tiles; without a GPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.cuda.emulated import Kit, close, coded_matrix, exact, normal

from ftkit import _core
from ftkit.cuda import launches
from ftkit.cuda.on_cpu import SCHEDULES
from ftkit.kernels.block_matmul import dequantize
from ftkit.kernels.blockwise_adamw import BLOCK, Blocks, Factors, blockwise_adamw, dynamic_map, edges_of, write
from ftkit.kernels.coded_matmul import Coded, coded_dense
from ftkit.kernels.cross_entropy import cross_entropy
from ftkit.kernels.paged_attention import paged_attention
from ftkit.kernels.rms_norm import rms_norm
from ftkit.kernels.rope import rope
from ftkit.kernels.swiglu import swiglu

pytestmark = pytest.mark.unit

RANK = 16


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("scheme", "shape", "dtype"),
    [
        ("nf4", (5, 64), torch.float32),
        ("nf4", (37, 448), torch.float32),
        ("nf4", (3, 35), torch.float32),  # a short last block, and an odd count
        ("nf4", (33, 64), torch.bfloat16),
        ("nf4:single", (9, 192), torch.float16),
        ("int4_group:32", (7, 96), torch.float32),
        ("int8", (5, 40), torch.float32),
    ],
)
def test_dequant_coded_has_the_bits_of_the_cpu(
    kit: Kit, scheme: str, shape: tuple[int, int], dtype: torch.dtype, schedule: int
) -> None:
    coded = coded_matrix(scheme, *shape)
    found = launches.dense(kit.launcher(schedule), coded, dtype)
    assert torch.equal(found, coded_dense(coded).to(dtype))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", launches.BLOCK_FORMATS)
def test_dequant_blocks_has_the_bits_of_the_cpu(kit: Kit, kind: str, schedule: int) -> None:
    size, nbytes = {name: rest for name, *rest in _core.quant_formats()}[kind]
    random = torch.randint(256, (5, 3 * nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    for start in range(0, 3 * nbytes, nbytes):  # scales that are numbers
        random[:, start + 1] = random[:, start + 1] % 0x78
        random[:, start + 3] = random[:, start + 3] % 0x78
        random[:, start + nbytes - 1] = random[:, start + nbytes - 1] % 0x78
    found = launches.block_dense(kit.launcher(schedule), kind, random, 3 * size)
    assert torch.equal(found, dequantize(kind, random))


def product(coded: Coded, x: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x Wᵀ + low Bᵀ in float64, and the sum of its terms' magnitudes."""
    w = exact(coded, x.dtype)
    terms = ((x.double(), w.T), (low.double(), b.double().T))
    return sum(p @ q for p, q in terms), sum(p.abs() @ q.abs() for p, q in terms)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 64), (3, 9, 320), (4, 4, 576)])
def test_gemv(kit: Kit, m: int, n: int, k: int, schedule: int) -> None:
    coded, x = coded_matrix("nf4", n, k), normal(m, k)
    low, b = normal(m, RANK, seed=2, dtype=torch.float32), normal(n, RANK, seed=3)
    found = launches.matmul(kit.launcher(schedule), x, coded, low, b)
    close(found, *product(coded, x, low, b))


def test_gemv_of_groups_with_offsets(kit: Kit) -> None:
    coded, x = coded_matrix("int4_group:32", 6, 288), normal(2, 288, dtype=torch.float32)
    found = launches.matmul(kit.launcher(1), x, coded)
    close(found, *product(coded, x, torch.zeros(2, 0), torch.zeros(6, 0)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("scheme", "m", "n", "k"),
    [("nf4", 5, 8, 64), ("nf4", 16, 40, 576), ("nf4:single", 9, 32, 2368), ("nf4", 13, 72, 192)],
)
def test_decode(kit: Kit, scheme: str, m: int, n: int, k: int, schedule: int) -> None:
    coded, x = coded_matrix(scheme, n, k), normal(m, k)
    low, b = normal(m, RANK, seed=2, dtype=torch.float32), normal(n, RANK, seed=3)
    found = launches.matmul(kit.launcher(schedule), x, coded, low, b)
    close(found, *product(coded, x, low, b))


def test_few_rows_of_long_sums_are_decoded_as_many_are(kit: Kit) -> None:
    """One row has the bits that it has among 16."""
    coded, x = coded_matrix("nf4", 8, launches.DECODE_COLUMNS), normal(16, launches.DECODE_COLUMNS)
    found = launches.matmul(kit.launcher(), x, coded)
    close(found, *product(coded, x, torch.zeros(16, 0), torch.zeros(8, 0)))
    assert torch.equal(launches.matmul(kit.launcher(), x[3:4], coded), found[3:4])


TILES = [
    ("nf4", 17, 8, 64, 16),
    ("nf4", 17, 264, 64, 16),
    ("nf4:single", 140, 136, 320, 32),
    ("nf4", 128, 128, 128, 0),
    ("nf4", 129, 8, 320, 16),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("scheme", "m", "n", "k", "rank"), TILES)
def test_forward(kit: Kit, scheme: str, m: int, n: int, k: int, rank: int, schedule: int) -> None:
    coded, x = coded_matrix(scheme, n, k), normal(m, k)
    low, b = normal(m, rank, seed=2), normal(n, rank, seed=3)
    found = launches.matmul(kit.launcher(schedule), x, coded, low, b)
    close(found, *product(coded, x, low, b))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("scheme", "m", "n", "k", "rank"), [("nf4", 1, 8, 64, 16), *TILES, ("nf4", 3, 200, 192, 16)])
def test_dx(kit: Kit, scheme: str, m: int, n: int, k: int, rank: int, schedule: int) -> None:
    coded, dy = coded_matrix(scheme, n, k), normal(m, n)
    dlow, a = normal(m, rank, seed=2), normal(rank, k, seed=3)
    found = launches.matmul_transposed(kit.launcher(schedule), dy, coded, dlow, a)
    w = exact(coded, torch.bfloat16)
    terms = ((dy.double(), w), (dlow.double(), a.double()))
    close(found, sum(p @ q for p, q in terms), sum(p.abs() @ q.abs() for p, q in terms))


@given(
    st.integers(1, 40),
    st.integers(1, 17),
    st.integers(1, 5),
    st.sampled_from([0, 3, 16, 20]),
    st.sampled_from(SCHEDULES),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_of_any_shape(kit: Kit, m: int, eighths: int, steps: int, rank: int, schedule: int) -> None:
    """One row to more than two tiles, forward by the kernel for so many rows, and back."""
    n, k = 8 * eighths, 64 * steps
    coded, x, dy = coded_matrix("nf4", n, k, seed=m), normal(m, k), normal(m, n, seed=4)
    low, b, a = normal(m, rank, seed=2), normal(n, rank, seed=3), normal(rank, k, seed=5)
    close(launches.matmul(kit.launcher(schedule), x, coded, low, b), *product(coded, x, low, b))
    w = exact(coded, torch.bfloat16)
    terms = ((dy.double(), w), (low.double(), a.double()))
    found = launches.matmul_transposed(kit.launcher(schedule), dy, coded, low, a)
    close(found, sum(p @ q for p, q in terms), sum(p.abs() @ q.abs() for p, q in terms))


def test_a_row_does_not_depend_on_its_neighbours(kit: Kit) -> None:
    """Within a kernel, the bits of a row are those of the row alone."""
    coded, x = coded_matrix("nf4", 24, 192), normal(140, 192)
    launch = kit.launcher()
    for few, many in ((5, 16), (20, 140)):
        assert torch.equal(launches.matmul(launch, x[:few], coded), launches.matmul(launch, x[:many], coded)[:few])
    assert torch.equal(launches.matmul(launch, x[:1], coded), launches.matmul(launch, x[:3], coded)[:1])


def test_nothing_is_launched_for_nothing() -> None:
    def launch(*_: object) -> None:
        raise AssertionError("expected no launch")

    coded = coded_matrix("nf4", 8, 64)
    empty = torch.empty(0, 64, dtype=torch.bfloat16)
    assert launches.matmul(launch, empty, coded).shape == (0, 8)
    assert launches.matmul_transposed(launch, empty[:, :8], coded).shape == (0, 64)
    assert launches.swiglu(launch, empty, empty).shape == (0, 64)
    assert launches.cross_entropy(launch, empty, torch.empty(0, dtype=torch.int64), True)[0].shape == (0,)
    assert torch.equal(launches.rms_norm_dweight(launch, empty, empty, torch.empty(0)), torch.zeros(64))


TYPES = [torch.bfloat16, torch.float32]


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to a few roundings of the type."""
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=3 * unit, atol=3 * unit * float(expected.abs().max()))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (3, 2056), (9, 72)])
def test_rms_norm(kit: Kit, rows: int, d: int, dtype: torch.dtype, schedule: int) -> None:
    x, weight, dy = (normal(*shape, seed=s, dtype=dtype) for s, shape in enumerate(((rows, d), (d,), (rows, d))))
    launch = kit.launcher(schedule)
    y, scales = launches.rms_norm(launch, x, weight, 1e-5)
    near(y, rms_norm.reference(x, weight, 1e-5))
    leaves = [one.double().requires_grad_() for one in (x, weight)]
    dx, dweight = torch.autograd.grad(rms_norm.reference(*leaves, 1e-5), leaves, dy.double())
    near(launches.rms_norm_dx(launch, dy, x, weight, scales), dx.to(dtype))
    found = launches.rms_norm_dweight(launch, dy, x, scales).double()
    unit = torch.finfo(dtype).eps
    assert ((found - dweight).abs() <= 2 * unit * (dy.double() * x.double()).abs().sum(0) * scales.max()).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1031)])
def test_swiglu(kit: Kit, shape: tuple[int, int], dtype: torch.dtype, schedule: int) -> None:
    gate, up, dy = (3 * normal(*shape, seed=s, dtype=dtype) for s in range(3))
    launch = kit.launcher(schedule)
    near(launches.swiglu(launch, gate, up), swiglu.reference(gate, up))
    leaves = [one.double().requires_grad_() for one in (gate, up)]
    for found, expected in zip(
        launches.swiglu_backward(launch, dy, gate, up),
        torch.autograd.grad(swiglu.reference(*leaves), leaves, dy.double()),
        strict=True,
    ):
        near(found, expected.to(dtype))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 16), (7, 3, 64), (5, 9, 48)])
def test_rope(kit: Kit, tokens: int, heads: int, size: int, dtype: torch.dtype, schedule: int) -> None:
    x, angles = normal(tokens, heads, size, dtype=dtype), normal(tokens, size // 2, dtype=torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    launch = kit.launcher(schedule)
    assert torch.equal(launches.rope(launch, x, cos, sin), rope.reference(x, cos, sin))
    assert torch.equal(launches.rope(launch, x, cos, sin, back=True), rope.reference(x, cos, -sin))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("dtype", "gradient"), [(torch.bfloat16, True), (torch.float32, True), (torch.float16, False)])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (3, 97), (2, 1033)])
def test_cross_entropy(kit: Kit, rows: int, vocabulary: int, dtype: torch.dtype, gradient: bool, schedule: int) -> None:
    logits = 5 * normal(rows, vocabulary, dtype=dtype)
    targets = torch.arange(rows) * 31 % vocabulary
    losses, slope = launches.cross_entropy(kit.launcher(schedule), logits, targets, gradient)
    expected, expected_slope = cross_entropy.reference(logits, targets, gradient)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (slope is None) == (expected_slope is None)
    if slope is not None and expected_slope is not None:
        near(slope, expected_slope)


def test_tokens_that_are_ruled_out(kit: Kit) -> None:
    """Logits of −∞ have no share, wherever they are."""
    logits = normal(2, 600, dtype=torch.float32)
    logits[0, :300], logits[1, 200:] = -torch.inf, -torch.inf
    targets = torch.tensor([400, 100])
    losses, slope = launches.cross_entropy(kit.launcher(), logits, targets, True)
    expected, expected_slope = cross_entropy.reference(logits, targets, True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert slope is not None
    assert expected_slope is not None
    near(slope, expected_slope)


def test_a_target_that_is_no_token_gives_nan(kit: Kit) -> None:
    logits = normal(3, 8)
    losses, _ = launches.cross_entropy(kit.launcher(), logits, torch.tensor([-100, 8, 7]), True)
    assert losses.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("size", "window"), [(64, None), (64, 5), (128, None)])
def test_paged_attention(kit: Kit, size: int, window: int | None, schedule: int) -> None:
    """Four sequences of 1 to 49 tokens, of which 1 to 3 are new, on pages in no order."""
    dtype = torch.bfloat16 if size == 64 else torch.float32
    totals, lengths, block_tokens, heads = (1, 17, 49, 5), (1, 2, 1, 3), 4, 6
    pages = normal(40, 2, 2, block_tokens, 2, size, dtype=dtype)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2)).int()
    table = torch.stack([order[i : i + 13] for i in range(0, 36, 9)])
    positions = torch.cat([torch.arange(t - n, t) for t, n in zip(totals, lengths, strict=True)]).int()
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    q = normal(sum(lengths), heads, size, seed=3, dtype=dtype)
    found = launches.paged_attention(kit.launcher(schedule), q, pages, table, ends, positions, 1, size**-0.5, window)
    wide = (q.double(), pages.double(), table, ends, positions, lengths, totals)
    near(found, paged_attention.reference(*wide, layer=1, scale=size**-0.5, window=window).to(dtype))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [1, 256, 700])
def test_adamw_8bit(kit: Kit, count: int, schedule: int) -> None:
    def state(signed: bool) -> Blocks:
        values = normal(count, seed=5, dtype=torch.float32) * 1e-2
        values[count - count // 4 :] = 0
        found = Blocks(
            codes=torch.zeros(count, dtype=torch.uint8),
            greatest=torch.zeros(-(-count // BLOCK)),
            map=dynamic_map(signed),
        )
        write(found, values if signed else values.square())
        return found

    weight, gradient = normal(count, dtype=torch.float32), normal(count, seed=2, dtype=torch.float32)
    gradient[count // 2 :] = 0
    factors = Factors(beta1=0.9, beta2=0.999, epsilon=1e-8, rate=1e-3, correction=0.3, kept=0.99)
    states = [state(True), state(False)]
    ours = [state(True), state(False)]
    moved = weight.clone()
    blockwise_adamw.reference(weight, gradient, *states, factors)
    parts = [(one.codes, one.greatest, one.map, edges_of(one.map)) for one in ours]
    launches.adamw_8bit(kit.launcher(schedule), moved, gradient, *parts, [0.9, 0.999, 1e-8, 1e-3, 0.3, 0.99])
    torch.testing.assert_close(moved, weight, rtol=1e-6, atol=1e-7)
    for one, other in zip(ours, states, strict=True):
        torch.testing.assert_close(one.greatest, other.greatest, rtol=1e-6, atol=0)
        apart = (one.codes.int() - other.codes.int()).abs()
        assert apart.max() <= 1, "a share next to an edge may fall on its other side"
        assert (apart > 0).sum() <= count // 100
