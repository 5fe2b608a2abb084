"""Every way to hold a weight keeps the protocol's promises, for every block format."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from ftkit import plugins
from ftkit._core import quant_formats
from ftkit.errors import InputError
from ftkit.nn.linear import DenseWeight, Weight
from ftkit.quant._scheme import QuantizedWeight, Scheme
from ftkit.quant.gguf import GgufWeight

pytestmark = pytest.mark.contract

ROWS, COLUMNS = 37, 512
SCHEMES = [
    f"{name}:{option}" if option else name
    for name in plugins.names("quant")
    for option in getattr(plugins.load("quant", name), "OPTIONS", ())
]
FORMATS = {name: (size, nbytes) for name, size, nbytes in quant_formats()}


def values() -> torch.Tensor:
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    made[0] = 0  # whole blocks of zeros
    made[1] *= 1e-38  # products with denormal scales
    return made


def scheme(kind: str) -> Scheme:
    name, _, option = kind.partition(":")
    found: Scheme = plugins.load("quant", name).scheme(option)
    return found


def held(kind: str, dtype: torch.dtype = torch.float32) -> Weight:
    """`values` in the format; `dense` is the weight of its first row's kind."""
    if kind == "dense":
        return DenseWeight(values().to(dtype))
    if kind in SCHEMES:
        held: Weight = scheme(kind).weight(values(), dtype)
        return held
    size, nbytes = FORMATS[kind]
    empty = torch.zeros(ROWS, COLUMNS // size * nbytes, dtype=torch.uint8)
    return GgufWeight(empty, kind, dtype).replace_dense(values())


@pytest.fixture(params=["dense", *FORMATS, *SCHEMES])
def weight(request: pytest.FixtureRequest) -> Weight:
    return held(request.param)


def test_products_are_those_of_the_dense_matrix(weight: Weight) -> None:
    generator = torch.Generator().manual_seed(5)
    x, dy = torch.randn(11, COLUMNS, generator=generator), torch.randn(11, ROWS, generator=generator)
    dense = weight.dense()
    assert isinstance(weight, Weight)
    assert weight.shape == tuple(dense.shape) == (ROWS, COLUMNS)
    y, dx = weight.matmul(x), weight.matmul_transposed(dy)
    assert torch.equal(y, DenseWeight(dense).matmul(x))
    assert torch.equal(dx, DenseWeight(dense).matmul_transposed(dy))
    with torch.no_grad():
        assert torch.equal(y, weight.matmul(x)), "gradients change nothing"
    # float32 sums of 512 and of 37 products of numbers around 1, in another order than torch's in float64
    torch.testing.assert_close(y.double(), functional.linear(x.double(), dense.double()), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx.double(), dy.double() @ dense.double(), rtol=1e-5, atol=1e-5)
    assert weight.matmul(x[:0]).shape == (0, ROWS)
    assert weight.matmul_transposed(dy[:0]).shape == (0, COLUMNS)
    assert torch.equal(weight.matmul(x.T.contiguous().T), y), "strides change nothing"


def test_in_training_sums_may_have_another_order(weight: Weight) -> None:
    """The order is then the processor's choice; whose row it is, and which way W is stored, still change nothing."""
    assert isinstance(weight, nn.Module)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(70, COLUMNS, generator=generator)
    answered = weight.matmul(x)
    assert torch.equal(answered, weight.eval().matmul(x)), "a weight answers until a model that trains takes it along"
    trained = weight.train().matmul(x)
    sizes = functional.linear(x.double().abs(), weight.dense().double().abs())
    # K roundings of numbers that are no larger than these sums, at most; what three terms leave out is as much as eight
    assert ((trained - answered).abs() <= 2 * COLUMNS * 2**-24 * sizes + 1e-30).all()
    assert torch.equal(trained, DenseWeight(weight.dense()).train().matmul(x))
    assert torch.equal(trained[69:], weight.matmul(x[69:]))
    offsets = weight.group_offsets()
    if offsets is not None:
        assert torch.equal(trained, offsets.replace(offsets.values).matmul(x))


def test_rows_are_the_dense_matrix_rows(weight: Weight) -> None:
    for numbers in (torch.tensor([5, 0, 36, 5], dtype=torch.int32), torch.tensor([], dtype=torch.int32)):
        assert torch.equal(weight.rows(numbers), weight.dense()[numbers.long()])


def test_the_gradient_reaches_the_input_and_keeps_no_dense_matrix(weight: Weight) -> None:
    x = torch.randn(7, COLUMNS, requires_grad=True)
    dy = torch.randn(7, ROWS)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = weight.matmul(x)
    y.backward(dy)
    assert x.grad is not None
    assert torch.equal(x.grad, weight.matmul_transposed(dy))
    assert kept == []


def test_blocks_of_a_file_hold_the_same_numbers(weight: Weight) -> None:
    found = weight.blocks_of_file()
    if isinstance(weight, GgufWeight) or (isinstance(weight, QuantizedWeight) and "int4_group" in weight.scheme.name):
        assert found is not None
    if found is not None:
        kind, blocks = found
        again = GgufWeight(blocks, kind, torch.float32).dense()
        assert torch.equal(again.view(torch.int32), weight.dense().view(torch.int32))


def test_offsets_are_what_is_added_to_each_group(weight: Weight) -> None:
    offsets = weight.group_offsets()
    kind = weight.kind if isinstance(weight, GgufWeight) else getattr(getattr(weight, "scheme", None), "name", "")
    assert (offsets is not None) == (kind in ("q4_1", "q5_1") or kind.startswith("int4_group"))
    if offsets is None:
        return
    before = weight.dense()
    assert offsets.values.shape == (ROWS, COLUMNS // offsets.group)
    change = torch.randn(offsets.values.shape, generator=torch.Generator().manual_seed(4)).half()
    other = offsets.replace(change)
    again = other.group_offsets()
    assert again is not None
    assert torch.equal(again.values, change)
    assert other.nbytes == weight.nbytes
    moved = (change.double() - offsets.values.double()).repeat_interleave(offsets.group, 1)
    torch.testing.assert_close(other.dense().double(), before.double() + moved, rtol=1e-6, atol=1e-6)
    assert torch.equal(weight.dense(), before)  # which keeps its own


def test_values_come_back_near_and_zeros_exactly(weight: Weight) -> None:
    dense = weight.dense()
    assert dense.isfinite().all()
    assert not dense[0].any()
    # 2-bit formats have steps of a third of a block's range; a value is off by half a step and the scales' rounding
    assert (dense[2:] - values()[2:]).abs().max() < 2.5
    again = weight.replace_dense(dense)
    assert type(again) is type(weight)
    assert again.shape == weight.shape
    assert again.nbytes == weight.nbytes
    assert (again.dense()[2:] - dense[2:]).abs().max() < 2.5


def test_size_is_that_of_the_format(weight: Weight) -> None:
    if isinstance(weight, QuantizedWeight):
        count = ROWS * COLUMNS
        expected = {
            "nf4": count // 2 + 296 + 8 + 4,  # 296 blocks of 64, 2 of 256 blocks, one mean
            "fp4": count // 2 + 296 + 8 + 4,
            "nf4:single": count // 2 + 296 * 4,
            "fp4:single": count // 2 + 296 * 4,
            "int4": count // 2 + count // 64 * 3,
            "int4:32": count // 2 + count // 32 * 3,
            "int4:64": count // 2 + count // 64 * 3,
            "int4:128": count // 2 + count // 128 * 3,
            "int8": count + ROWS * 4,
            "int8:32": count + count // 32 * 4,
            "fp8_e4m3": count + ROWS * 4,
            "int4_group": count // 2 + count // 64 * 4,
            "int4_group:32": count // 2 + count // 32 * 4,
            "int4_group:64": count // 2 + count // 64 * 4,
            "int4_group:128": count // 2 + count // 128 * 4,
        }
        assert weight.nbytes == expected[weight.scheme.name]
        return
    size, nbytes = FORMATS[weight.kind] if isinstance(weight, GgufWeight) else (1, 4)
    assert weight.nbytes == ROWS * COLUMNS // size * nbytes


@pytest.mark.parametrize("kind", [*FORMATS, *SCHEMES])
def test_another_dtype_rounds_once(kind: str) -> None:
    half = held(kind, torch.bfloat16)
    assert torch.equal(half.dense(), held(kind).dense().to(torch.bfloat16))
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert half.matmul(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [*FORMATS, *SCHEMES])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(kind: str, wrong: float) -> None:
    bad = values()
    bad[3, 41] = wrong
    with pytest.raises(InputError, match="finite"):
        held(kind).replace_dense(bad)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="whole blocks of 20 bytes, got 30"):
        GgufWeight(torch.zeros(2, 30, dtype=torch.uint8), "q4_1", torch.float32)


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("sides", [(0, 512), (7, 0), (3, 97), (1, 1), (2, 96)])
def test_sides_that_are_no_whole_groups_are_right_or_refused(kind: str, sides: tuple[int, int]) -> None:
    name, _, option = kind.partition(":")
    size = int(option) if option.isdigit() else None
    group = {"int8": size or 1, "int4_group": size or 64, "int4": size or 64}.get(name, 1)
    dense = torch.randn(sides, generator=torch.Generator().manual_seed(2))
    if sides[1] % group:
        with pytest.raises(InputError, match=f"whole groups of {group}, got {sides[1]}"):
            scheme(kind).weight(dense, torch.float32)
        return
    if not dense.numel():
        with pytest.raises(InputError, match="expected a matrix with values"):
            scheme(kind).weight(dense, torch.float32)
        return
    weight = scheme(kind).weight(dense, torch.float32)
    assert weight.dense().shape == weight.shape == sides
    assert {n: (tuple(p.shape), p.dtype) for n, p in weight.parts.items()} == scheme(kind).layout(sides)
    assert (weight.dense() - dense).abs().max() < 0.6


# the root mean square error on normal weights, in standard deviations: nf4 and fp4 as the literature has them
NORMAL_ERROR = {"nf4": 0.093, "fp4": 0.125, "int8": 0.0085, "int8:32": 0.0055, "fp8_e4m3": 0.027, "int4_group": 0.088}
NORMAL_ERROR |= {"nf4:single": 0.093, "fp4:single": 0.125}
NORMAL_ERROR |= {"int4": 0.09, "int4:64": 0.09, "int4:32": 0.08, "int4:128": 0.098}
NORMAL_ERROR |= {"int4_group:64": 0.088, "int4_group:32": 0.076, "int4_group:128": 0.1}


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_the_error_is_the_scheme_s(kind: str, size: float) -> None:
    dense = size * torch.randn(64, 1024, generator=torch.Generator().manual_seed(7))
    error = float((scheme(kind).weight(dense, torch.float32).dense() - dense).square().mean().sqrt()) / size
    assert 0.75 * NORMAL_ERROR[kind] < error < NORMAL_ERROR[kind]


@pytest.mark.parametrize("kind", SCHEMES)
def test_slabs_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scheme(kind).encode(values())
    for module in ("_scheme", "_codebook"):
        monkeypatch.setattr(f"ftkit.quant.{module}.SLAB", 2048)
    cut = scheme(kind).encode(values())
    assert all(torch.equal(whole[name].view(torch.uint8), cut[name].view(torch.uint8)) for name in whole)
