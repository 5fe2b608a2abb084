"""Products with 4-bit codes that have offsets, in the emulator: int4_group's and QALoRA's weights."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.cuda.emulated import Kit, close, coded_matrix, exact, normal

from ftkit.cuda import launches
from ftkit.cuda.on_cpu import SCHEDULES
from ftkit.errors import InputError
from ftkit.kernels import _gpu, pinned
from ftkit.kernels.coded_matmul import arguments
from ftkit.kernels.offset_linear import offset_linear

pytestmark = pytest.mark.unit

BF16 = torch.bfloat16


def forward(kit: Kit, group: int, m: int, n: int, k: int, schedule: int) -> None:
    coded, x = coded_matrix(f"int4_group:{group}", n, k), normal(m, k)
    assert launches.takes_tiles(x, coded)
    w = exact(coded, BF16)
    close(launches.matmul(kit.launcher(schedule), x, coded), x.double() @ w.T, x.double().abs() @ w.T.abs())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("group", "m", "n", "k"), [(64, 5, 8, 64), (64, 16, 40, 576), (32, 13, 72, 192)])
def test_decode(kit: Kit, group: int, m: int, n: int, k: int, schedule: int) -> None:
    forward(kit, group, m, n, k, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("group", "m", "n", "k"), [(32, 17, 8, 64), (64, 140, 136, 192), (64, 128, 128, 128)])
def test_forward(kit: Kit, group: int, m: int, n: int, k: int, schedule: int) -> None:
    forward(kit, group, m, n, k, schedule)


def test_with_low_rank_matrices(kit: Kit) -> None:
    """QLoRA over int4_group: the same kernels add them, up to 16 rows and from there on."""
    coded, b, a = coded_matrix("int4_group:32", 24, 128), normal(24, 20, seed=3), normal(20, 128, seed=5)
    w = exact(coded, BF16)
    for m in (3, 11, 33):
        x, dy, low = normal(m, 128), normal(m, 24), normal(m, 20, seed=2)
        terms = ((x.double(), w.T), (low.double(), b.double().T))
        found = launches.matmul(kit.launcher(1), x, coded, low, b)
        close(found, sum(p @ q for p, q in terms), sum(p.abs() @ q.abs() for p, q in terms))
        terms = ((dy.double(), w), (low.double(), a.double()))
        found = launches.matmul_transposed(kit.launcher(1), dy, coded, low, a)
        close(found, sum(p @ q for p, q in terms), sum(p.abs() @ q.abs() for p, q in terms))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("group", "m", "n", "k"), [(64, 1, 8, 64), (32, 3, 200, 192), (64, 130, 72, 128)])
def test_dx(kit: Kit, group: int, m: int, n: int, k: int, schedule: int) -> None:
    coded, dy = coded_matrix(f"int4_group:{group}", n, k), normal(m, n)
    w = exact(coded, BF16)
    found = launches.matmul_transposed(kit.launcher(schedule), dy, coded)
    close(found, dy.double() @ w, dy.double().abs() @ w.abs())


@given(
    st.integers(1, 150), st.integers(1, 20), st.integers(1, 4), st.sampled_from([32, 64]), st.sampled_from(SCHEDULES)
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_of_any_shape(kit: Kit, m: int, eighths: int, steps: int, group: int, schedule: int) -> None:
    """One row to more than a tile, forward by the kernel for so many rows, and back."""
    forward(kit, group, m, 8 * eighths, 64 * steps, schedule)
    test_dx(kit, group, m, 8 * eighths, 64 * steps, schedule)


def test_groups_of_128_with_any_table(kit: Kit) -> None:
    """As converters of other layouts make them: codes stand for what the table says."""
    coded = dataclasses.replace(coded_matrix("int4_group:128", 24, 256), table=torch.linspace(-9.3, 2.1, 16))
    x, dy = normal(18, 256), normal(18, 24)
    w = exact(coded, BF16)
    close(launches.matmul(kit.launcher(1), x, coded), x.double() @ w.T, x.double().abs() @ w.T.abs())
    close(launches.matmul(kit.launcher(2), x[:7], coded), x[:7].double() @ w.T, x[:7].double().abs() @ w.T.abs())
    close(launches.matmul_transposed(kit.launcher(2), dy, coded), dy.double() @ w, dy.double().abs() @ w.abs())


def test_a_row_does_not_depend_on_its_neighbours(kit: Kit) -> None:
    coded, x, launch = coded_matrix("int4_group", 24, 192), normal(140, 192), kit.launcher()
    for few, many in ((5, 16), (20, 140)):
        assert torch.equal(launches.matmul(launch, x[:few], coded), launches.matmul(launch, x[:many], coded)[:few])


def test_what_kernels_take() -> None:
    coded = coded_matrix("int4_group:32", 16, 128)
    x = normal(20, 128)
    assert launches.takes_tiles(x, coded)
    assert not launches.takes_tiles(x.float(), coded), "bfloat16 alone"
    assert not launches.takes_tiles(normal(20 * 128 + 1)[1:].view(20, 128), coded), "not aligned"
    assert not launches.takes_tiles(x, coded_matrix("int4_group:32", 12, 128)), "no whole eights"
    assert not launches.takes_tiles(normal(20, 96), coded_matrix("int4_group:32", 16, 96)), "no whole steps"
    assert coded.offsets is not None
    assert not launches.takes_tiles(x, dataclasses.replace(coded, offsets=coded.offsets.float())), "offsets in halves"
    assert not launches.takes_tiles(x, dataclasses.replace(coded, group=16)), "no group of 16"
    assert not launches.takes_tiles(x, dataclasses.replace(coded, scales=coded.scales.T.contiguous().T)), "strides"


def test_bad_arguments_are_named(kit: Kit) -> None:
    coded, x = coded_matrix("int4_group", 16, 128), normal(20, 128)
    with pytest.raises(InputError, match=r"coded_forward: x: expected torch.bfloat16, got torch.float32"):
        launches.matmul(kit.launcher(), x.float(), coded)
    with pytest.raises(InputError, match=r"coded_forward: x: expected a contiguous tensor, got strides \(256, 2\)"):
        launches.matmul(kit.launcher(), normal(20, 256)[:, ::2], coded)
    other = dataclasses.replace(coded, offsets=torch.zeros(16, 2))
    with pytest.raises(InputError, match=r"coded_dx: offsets: expected torch.float16, got torch.float32"):
        launches.matmul_transposed(kit.launcher(), normal(20, 16), other)
    with pytest.raises(InputError, match=r"product with codes: x: expected the shape \[20, 128\], got \[20, 64\]"):
        launches.matmul(kit.launcher(), normal(20, 64), coded)
    with pytest.raises(
        InputError, match=r"transposed product with codes: dy: expected the shape \[20, 16\], got \[20, 8\]"
    ):
        launches.matmul_transposed(kit.launcher(), normal(20, 8), coded)
    with pytest.raises(InputError, match=r"product with codes: scales: expected the shape \[32\], got \[30\]"):
        launches.matmul(kit.launcher(), x, dataclasses.replace(coded, scales=coded.scales[:15]))


def test_nothing_is_launched_for_nothing() -> None:
    def launch(*_: object) -> None:
        raise AssertionError("expected no launch")

    coded, empty = coded_matrix("int4_group", 8, 64), torch.empty(0, 64, dtype=BF16)
    assert launches.matmul(launch, empty, coded).shape == (0, 8)
    assert launches.matmul_transposed(launch, empty[:, :8], coded).shape == (0, 64)


@pytest.mark.parametrize("rows", [3, 9, 40])
def test_qalora_on_a_gpu(gpu: list[str], rows: int) -> None:
    """Values and gradients of a layer whose offsets are trained, against its reference in float64."""
    coded = coded_matrix("int4_group", 24, 128)

    class Stored:
        """W of these offsets, by the operations."""

        def __init__(self, moved: torch.Tensor) -> None:
            self.coded = dataclasses.replace(coded, offsets=moved)

        def matmul(self, x: torch.Tensor) -> torch.Tensor:
            return _gpu.runs["coded_matmul"](x, False, *arguments(self.coded))

        def matmul_transposed(self, dy: torch.Tensor) -> torch.Tensor:
            return _gpu.runs["coded_matmul_transposed"](dy, dy.dtype, *arguments(self.coded))

        def dense(self) -> torch.Tensor:
            return exact(self.coded, BF16)

    class Offsets:
        group, values, replace = 64, coded.offsets, Stored

    x, a, b = normal(rows, 128).requires_grad_(), torch.randn(3, 2, requires_grad=True), torch.randn(24, 3)
    b.requires_grad_()
    with pinned("fused"):
        y = offset_linear(x, Offsets(), a, b, 0.1)
    found = torch.autograd.grad(y, (x, a, b), normal(rows, 24, seed=4))
    wide = [one.detach().double().requires_grad_() for one in (x, a, b)]
    expected = offset_linear.reference(wide[0], Offsets(), *wide[1:], 0.1)
    gradients = torch.autograd.grad(expected, wide, normal(rows, 24, seed=4).double())
    for one, other in zip((y, *found), (expected, *gradients), strict=True):
        assert (one.double() - other).norm() < 2e-2 * other.norm()
    assert gpu == [{3: "coded_gemv", 9: "coded_decode", 40: "coded_forward"}[rows], "coded_dx"]
