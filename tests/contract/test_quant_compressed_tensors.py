"""int4 is what compressed-tensors packs and decodes, to the bit, and nearer than its own choice of scales."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from ftkit.models import _compressed_tensors
from ftkit.quant import int4

pytestmark = pytest.mark.contract


def weights(kind: str, rows: int) -> torch.Tensor:
    made = torch.randn(rows, 256, generator=torch.Generator().manual_seed(11))
    if kind == "shifted":
        made = made * 0.2 + 1
    if kind == "heavy":
        made = made**3
    if kind == "sparse":
        made = made * (made.abs() > 1.5)
    return made * 0.03


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["normal", "shifted", "heavy", "sparse"])
@pytest.mark.parametrize("rows", [5, 16, 37])
def test_packed_and_decoded_alike(group: int, kind: str, rows: int) -> None:
    dense = weights(kind, rows)[:, : group if rows == 37 else 256]  # a single group, too
    scheme = int4.scheme(str(group))
    weight = scheme.weight(dense, torch.bfloat16)
    made = _compressed_tensors.tensors("w", weight, torch.bfloat16)
    table = _compressed_tensors.configuration(scheme.name, torch.bfloat16, [])["config_groups"]["group_0"]
    theirs = QuantizationScheme(**table)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    decoded = compressor.decompress({name.replace("w_", "weight_"): part for name, part in made.items()}, theirs)
    assert torch.equal(decoded["weight"], weight.dense())
    state = {name: decoded[name] for name in ("weight", "weight_scale", "weight_zero_point")}
    again = compressor.compress(state, theirs)
    for name in ("packed", "scale", "zero_point", "shape"):
        assert torch.equal(again[f"weight_{name}"], made[f"w_{name}"]), name


@pytest.mark.parametrize("kind", ["normal", "shifted", "heavy", "sparse"])
def test_no_further_from_the_weights_than_its_own_scales(kind: str) -> None:
    dense = weights(kind, 37)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=64)
    groups = dense.view(37, -1, 64)
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
    scale = scale.bfloat16().float()
    theirs = dequantize(quantize(dense, scale, zero, args), scale, zero, args)
    ours = int4.scheme("64").weight(dense, torch.float32).dense()
    errors = [(made - dense).square().sum() for made in (ours, theirs)]
    assert errors[0] <= errors[1] * {"shifted": 1.0, "sparse": 1.0}.get(kind, 0.97)
