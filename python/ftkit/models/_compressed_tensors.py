"""Matrices in 4 bits as compressed-tensors packs them in safetensors, which transformers and vLLM load: scheme `int4`.

In place of `NAME.weight` [out, in]:

    NAME.weight_packed      int32 [out, in / 8], eight codes, the first in the lowest bits
    NAME.weight_scale       float [out, in / group]
    NAME.weight_zero_point  int32 [⌈out / 8⌉, in / group], eight rows packed; without it every zero point is 8
    NAME.weight_shape       int64 [2]

Source: compressed-tensors' `PackedQuantizationCompressor`, format `pack-quantized`.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ftkit.errors import InputError
from ftkit.models._weights import Safetensors

METHOD = "compressed-tensors"
SCHEMES = ("int4",)
_GROUPS = (32, 64, 128)
_PACKED, _PARTS = "_packed", ("_packed", "_scale", "_zero_point", "_shape")


def scheme(table: Mapping[str, Any]) -> str:
    """The scheme that a `quantization_config` tells. Raises InputError for one that is not weights in 4 bits."""
    groups = [group for group in (table.get("config_groups") or {}).values() if isinstance(group, dict)]
    form, weights = table.get("format"), dict(groups[0].get("weights") or {}) if len(groups) == 1 else {}
    found = (form, len(groups), *(weights.get(key) for key in ("num_bits", "type", "group_size")))
    rounds = any(group.get(key) for group in groups for key in ("input_activations", "output_activations"))
    if found[:4] != ("pack-quantized", 1, 4, "int") or found[4] not in _GROUPS or rounds:
        raise InputError(
            "quantization_config: expected compressed-tensors of (format, groups of layers, bits, type, group) "
            f"('pack-quantized', 1, 4, 'int', {_GROUPS}) and no activations, got {found}",
            "load and save it dequantized with transformers, or take the published model that it was made of",
        )
    return f"int4:{found[4]}"


def sides(weights: Safetensors) -> dict[str, tuple[int, int]]:
    """Name → (out, in) of the quantized matrices."""
    names = [name.removesuffix(_PACKED) for name in weights.shapes if name.endswith(f".weight{_PACKED}")]
    found = {}
    for name in names:
        shape = weights.stored(f"{name}_shape").tolist() if f"{name}_shape" in weights.shapes else None
        if not isinstance(shape, list) or len(shape) != 2:
            raise InputError(f"{name}_shape: expected two sides, got {shape!r}")
        found[name] = (int(shape[0]), int(shape[1]))
    return found


def tensors_of(name: str) -> set[str]:
    """The names of tensors that the matrix `name` may have."""
    return {f"{name}{part}" for part in _PARTS}


def parts(weights: Safetensors, name: str, scheme: str) -> dict[str, Tensor]:  # noqa: ARG001
    """The scheme's parts of the matrix `name`."""
    scales = weights.stored(f"{name}_scale")
    packed = weights.stored(f"{name}{_PACKED}").contiguous().view(torch.uint8)
    if f"{name}_zero_point" in weights.shapes:
        zeros = _unpacked(weights.stored(f"{name}_zero_point").t().contiguous())[:, : len(scales)].t().contiguous()
    else:
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    return {"codes": packed << 4 | packed >> 4, "scales": scales, "zeros": zeros}


def tensors(name: str, weight: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors of a `QuantizedWeight`, scales in `dtype`. Raises InputError for one that `dtype` rounds."""
    parts = weight.parts
    scales = parts["scales"].to(dtype)
    if not torch.equal(scales.float(), parts["scales"].float()):
        raise InputError(f"{name}: expected scales that {dtype} holds, got others", "--type bf16 and f32 hold them")
    packed = parts["codes"] << 4 | parts["codes"] >> 4
    return {
        f"{name}{_PACKED}": packed.contiguous().view(torch.int32),
        f"{name}_scale": scales,
        f"{name}_zero_point": _packed(parts["zeros"].t()).t().contiguous(),
        f"{name}_shape": torch.tensor(weight.shape),
    }


def configuration(scheme: str, dtype: torch.dtype, dense: Collection[str]) -> dict[str, Any]:  # noqa: ARG001
    """The `quantization_config` of matrices in `scheme`; `dense`: names of the linear layers that are not."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": int(scheme.partition(":")[2] or 64),
        "dynamic": False,
    }
    layers = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": layers},
        "ignore": list(dense),
        # transformers then decodes while it loads: with compressed-tensors 0.20 it has no place for packed zero points
        # otherwise, and decodes at the first forward pass anyway
        "dequantize": True,
    }


def _packed(values: Tensor) -> Tensor:
    """uint8 [rows, n] of 4 bits to int32 [rows, ⌈n / 8⌉], the first in the lowest bits."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 8))
    # flat, since a single row may keep a stride that another dtype can't be viewed by
    return (padded[:, ::2] | padded[:, 1::2] << 4).flatten().view(torch.int32).view(len(values), -1)


def _unpacked(values: Tensor) -> Tensor:
    """Back to uint8 [rows, 8 n]."""
    packed = values.flatten().view(torch.uint8).view(len(values), -1)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)
