"""Every quantizer: no block is worse than llama.cpp's reference, as the `gguf` package has it."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit import _core
from ftkit.errors import InputError

pytestmark = pytest.mark.contract

SIZES = {name: (size, nbytes) for name, size, nbytes in _core.quant_formats()}
KINDS = sorted(SIZES)


def quantize(kind: str, values: torch.Tensor) -> torch.Tensor:
    """The blocks of `values`, [bytes]."""
    size, nbytes = SIZES[kind]
    out = torch.empty(values.numel() // size * nbytes, dtype=torch.uint8)
    _core.quantize(kind, values, out)
    return out


def round_trip(kind: str, values: np.ndarray) -> np.ndarray:
    """`values` as they are after quantizing."""
    out = torch.empty(values.shape)
    _core.dequantize(kind, quantize(kind, torch.from_numpy(values)), out)
    return out.numpy()


def squared_errors(values: np.ndarray, restored: np.ndarray) -> np.ndarray:
    """The squared error of each block of 32."""
    return ((restored.astype(np.float64) - values) ** 2).reshape(-1, 32).sum(1)


def reference(kind: str, values: np.ndarray) -> np.ndarray:
    """`values` after the gguf package's quantizer."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(values, number), number)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(["normal", "heavy", "shifted", "uniform", "sparse", "ramp"])
)
def test_no_block_is_worse_than_the_reference(kind: str, seed: int, shape: str) -> None:
    generator = np.random.default_rng(seed)
    values = {
        "normal": lambda: generator.standard_normal((7, 96)),
        "heavy": lambda: generator.standard_t(2, (7, 96)),
        "shifted": lambda: 3 + generator.standard_normal((7, 96)) * 0.1,
        "uniform": lambda: generator.uniform(-1, 1, (7, 96)),
        "sparse": lambda: generator.standard_normal((7, 96)) * (generator.random((7, 96)) < 0.1),
        "ramp": lambda: np.linspace(-1, 1, 7 * 96).reshape(7, 96),
    }[shape]()
    values = (values * 10.0 ** generator.uniform(-3, 2)).astype(np.float32)
    ours, theirs = squared_errors(values, round_trip(kind, values)), squared_errors(values, reference(kind, values))
    # the slack is that of errors that are summed in single precision
    assert (ours <= theirs * (1 + 1e-4) + 1e-12 * (values**2).reshape(-1, 32).sum(1)).all()


@pytest.mark.parametrize(
    ("kind", "share"), [("q4_0", 0.9), ("q4_1", 0.9), ("q5_0", 0.95), ("q5_1", 0.95), ("q8_0", 1.0)]
)
def test_the_search_pays(kind: str, share: float) -> None:
    values = np.random.default_rng(3).standard_normal((64, 1024)).astype(np.float32)
    ours, theirs = (squared_errors(values, way(kind, values)).sum() for way in (round_trip, reference))
    assert ours <= share * theirs


# the root mean square error on normal weights that a good quantizer reaches, in standard deviations
NORMAL_ERROR = {
    "q2_k": 0.27,
    "q3_k": 0.148,
    "q4_k": 0.072,
    "q5_k": 0.0355,
    "q6_k": 0.0172,
    "iq4_nl": 0.0745,
    "iq4_xs": 0.075,
}


@pytest.mark.parametrize("kind", NORMAL_ERROR)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_formats_without_a_reference_reach_their_error(kind: str, scale: float) -> None:
    values = (np.random.default_rng(3).standard_normal((32, 1024)) * scale).astype(np.float32)
    error = np.sqrt(squared_errors(values, round_trip(kind, values)).sum() / values.size)
    assert error <= NORMAL_ERROR[kind] * scale * (1 + 2e-2 * (scale < 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["heavy", "shifted", "sparse", "one", "signed"])
def test_no_kind_of_weights_breaks_a_format(kind: str, shape: str) -> None:
    generator = np.random.default_rng(9)
    values = {
        "heavy": lambda: generator.standard_t(2, (5, 512)),
        "shifted": lambda: -3 + generator.standard_normal((5, 512)) * 0.1,
        "sparse": lambda: generator.standard_normal((5, 512)) * (generator.random((5, 512)) < 0.02),
        "one": lambda: np.eye(5, 512) * 100,
        "signed": lambda: np.abs(generator.standard_normal((5, 512))),
    }[shape]().astype(np.float32)
    error = np.sqrt(squared_errors(values, round_trip(kind, values)).sum() / (values**2).sum())
    assert error <= {"q2_k": 0.35, "q3_k": 0.2}.get(kind, 0.15)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_floats_are_rounded_as_the_gguf_package_does(kind: str) -> None:
    generator = np.random.default_rng(5)
    values = (generator.standard_normal((13, 64)) * 10.0 ** generator.uniform(-9, 4, (13, 64))).astype(np.float32)
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
    ours = quantize(kind, torch.from_numpy(values))
    assert np.array_equal(ours.numpy(), np.ascontiguousarray(theirs).view(np.uint8).ravel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -7.25, 65504.0])
def test_constant_blocks_keep_their_value(kind: str, value: float) -> None:
    values = np.full((1, 512), value, dtype=np.float32)
    restored = round_trip(kind, values)
    assert np.abs(restored - values).max() <= abs(value) * 2e-3 + 6e-8  # the least half-precision number


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_place(kind: str, value: float) -> None:
    values = torch.zeros(512)
    values[37] = value
    with pytest.raises(InputError, match=r"expected finite values, got .* at index 37"):
        quantize(kind, values)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "f32"])
def test_values_beyond_the_formats_range_are_refused(kind: str) -> None:
    values = torch.zeros(512)
    values[5] = 3.4e38
    with pytest.raises(InputError, match=r"expected values of at most .* at index 5"):
        quantize(kind, values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_types_of_torch_give_the_same_blocks(kind: str) -> None:
    values = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(quantize(kind, values), quantize(kind, values.float()))
