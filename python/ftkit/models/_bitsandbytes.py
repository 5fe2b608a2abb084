"""Matrices in 4 bits as bitsandbytes writes them to safetensors, which transformers loads: schemes `nf4` and `fp4`.

Beside `NAME.weight`, uint8 [⌈n / 2⌉, 1] with two codes a byte, the first in the high half:

    NAME.weight.quant_map                        float32 [16], what codes mean
    NAME.weight.absmax                           uint8 [⌈n / 64⌉], codes of scales; float32 scales where not nested
    NAME.weight.nested_absmax, nested_quant_map  float32 [⌈n / 16384⌉] and [256], what the scales' codes mean
    NAME.weight.quant_state.bitsandbytes__nf4    uint8, a JSON object: sides, sizes of blocks, the scales' mean

Source: bitsandbytes' `QuantState.as_dict` and transformers' `BitsAndBytesConfig`.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ftkit.errors import InputError
from ftkit.models._weights import Safetensors

METHOD = "bitsandbytes"
SCHEMES = ("nf4", "fp4")
_STATE = ".quant_state.bitsandbytes__"
_BLOCK, _NESTED_BLOCK = 64, 256


def scheme(table: Mapping[str, Any]) -> str:
    """The scheme that a `quantization_config` tells. Raises InputError for bitsandbytes' 8 bits."""
    if not table.get("load_in_4bit", table.get("_load_in_4bit", False)):
        raise InputError(
            "quantization_config: expected bitsandbytes in 4 bits, got another (load_in_8bit)",
            "load and save it dequantized with transformers, or take the published model that it was made of",
        )
    kind = table.get("bnb_4bit_quant_type", "fp4")
    if kind not in SCHEMES:
        raise InputError(f"bnb_4bit_quant_type: expected one of {', '.join(SCHEMES)}, got {kind!r}")
    return str(kind) if table.get("bnb_4bit_use_double_quant") else f"{kind}:single"


def sides(weights: Safetensors) -> dict[str, tuple[int, int]]:
    """Name → (out, in) of the quantized matrices."""
    names = [name.partition(_STATE)[0] for name in weights.shapes if _STATE in name]
    return {name: _sides(name, _state(weights, name)) for name in names}


def tensors_of(name: str) -> set[str]:
    """The names of tensors that the matrix `name` may have."""
    tables = {f"{name}.{part}" for part in ("quant_map", "absmax", "nested_absmax", "nested_quant_map")}
    return {name, *tables, *(f"{name}{_STATE}{kind}" for kind in SCHEMES)}


def parts(weights: Safetensors, name: str, scheme: str) -> dict[str, Tensor]:
    """The scheme's parts of the matrix `name`; its `table` and `map`, too, as the file has them.

    Raises InputError for blocks of other sizes.
    """
    state = _state(weights, name)
    nested = f"{name}.nested_absmax" in weights.shapes
    wanted = (scheme.partition(":")[0], _BLOCK, _NESTED_BLOCK if nested else None, not scheme.endswith(":single"))
    found = (state.get("quant_type"), state.get("blocksize"), state.get("nested_blocksize"), nested)
    if found != wanted:
        raise InputError(f"{name}: expected (type, block, block of scales, nested) of {wanted}, got {found}")
    made = {
        "codes": weights.stored(name).contiguous().view(-1).view(torch.uint8),
        "scales": weights.stored(f"{name}.absmax").view(-1),
        "table": weights.stored(f"{name}.quant_map"),
    }
    if nested:
        made["scale_scales"] = weights.stored(f"{name}.nested_absmax")
        made["scale_mean"] = torch.tensor([float(state["nested_offset"])])
        made["map"] = weights.stored(f"{name}.nested_quant_map")
    return made


def tensors(name: str, weight: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors of a `QuantizedWeight`; `dtype` is what readers dequantize it to."""
    coded, parts = weight.coded, weight.parts
    state = {
        "quant_type": weight.scheme.name.partition(":")[0],
        "blocksize": _BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    # safetensors wants memory of its own for each tensor
    table = coded.table.clone()
    made = {name: parts["codes"].view(-1, 1), f"{name}.absmax": parts["scales"], f"{name}.quant_map": table}
    if coded.nested is not None:
        state |= {
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(coded.nested.mean),
        }
        made |= {f"{name}.nested_absmax": coded.nested.greatest, f"{name}.nested_quant_map": coded.nested.map.clone()}
    content = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return made | {f"{name}{_STATE}{state['quant_type']}": content}


def configuration(scheme: str, dtype: torch.dtype, dense: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of matrices in `scheme`; `dense`: names of the linear layers that are not."""
    kind, _, option = scheme.partition(":")
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": option != "single",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense),
    }


def _state(weights: Safetensors, name: str) -> dict[str, Any]:
    """The JSON object of a matrix."""
    (key,) = (f"{name}{_STATE}{kind}" for kind in SCHEMES if f"{name}{_STATE}{kind}" in weights.shapes)
    try:
        state = json.loads(bytes(weights.stored(key).tolist()))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: expected a JSON object, got: {str(error).lower()}") from None
    if not isinstance(state, dict):
        raise InputError(f"{key}: expected a JSON object, got {type(state).__name__}")
    return state


def _sides(name: str, state: Mapping[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise InputError(f"{name}: expected two sides, got {shape!r}")
    return shape[0], shape[1]
