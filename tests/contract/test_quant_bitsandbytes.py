"""nf4 and fp4 are those of bitsandbytes' CPU backend, to the bit: codes, both levels of scales, decoded values."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from bitsandbytes import functional

from ftkit import plugins
from ftkit.quant._codebook import dynamic_map

pytestmark = pytest.mark.contract

SIDES = [(64, 576), (37, 512), (7, 97), (1, 1), (3, 40), (300, 640)]


@pytest.fixture(autouse=True, scope="module")
def _eager() -> Iterator[None]:
    """Their functions as they are written: compiling them for each shape takes longer than all the rest."""
    with torch._dynamo.config.patch(disable=True):
        yield


def weights(kind: str, sides: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    made = torch.randn(sides, generator=generator)
    if kind == "heavy":
        made = made / torch.rand(sides, generator=generator).clamp(min=1e-3) * 0.02
    if kind == "odd":
        made[0] = 0
        made[-1] *= 1e-39
        made.view(-1)[::7] = 0
        made.view(-1)[::11] *= -1
    return made


def test_the_map_of_scales() -> None:
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "odd"])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_values(name: str, kind: str, sides: tuple[int, int], dtype: torch.dtype) -> None:
    dense = weights(kind, sides).to(dtype)
    codes, state = functional.quantize_4bit(dense, compress_statistics=True, quant_type=name)
    theirs = functional.dequantize_4bit(codes, state)
    weight = plugins.load("quant", name).scheme().weight(dense, dtype)
    parts = weight.parts
    assert torch.equal(parts["codes"], codes.view(-1))
    assert torch.equal(parts["scale_mean"], state.offset.view(1))
    assert torch.equal(parts["scales"], state.absmax)
    assert torch.equal(parts["scale_scales"], state.state2.absmax)
    ours = weight.dense()
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_scales_that_are_not_quantized_again(name: str) -> None:
    dense = weights("heavy", (37, 512))
    codes, state = functional.quantize_4bit(dense, compress_statistics=False, quant_type=name)
    weight = plugins.load("quant", name).scheme("single").weight(dense, torch.float32)
    assert torch.equal(weight.parts["codes"], codes.view(-1))
    assert torch.equal(weight.parts["scales"], state.absmax)
    assert torch.equal(weight.dense(), functional.dequantize_4bit(codes, state))
