"""A directory of safetensors, as transformers and most servers load it: weights, `config.json`, tokenizer, template.

Quantized matrices are written as bitsandbytes (`nf4`, `fp4`) or compressed-tensors (`int4`) writes them; the type is
that of all other weights, and what the matrices are computed in.
"""

from pathlib import Path

import torch
from torch import Tensor

from ftkit import models
from ftkit.errors import InputError
from ftkit.export._material import Material
from ftkit.models import LoadedModel

TYPES = ("bf16", "f16", "f32")
DEFAULT_TYPE = "bf16"
SUFFIX = ""
QUANTS = ("nf4", "fp4", "int4")
"""Schemes that matrices can be written in."""

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def write(material: Material, out: Path, kind: str) -> list[str]:
    """Writes the model to the directory `out`. Raises InputError for a weight that is too large for the type."""
    dense = {name: tensor for name, tensor in material.tensors.items() if name not in material.quantized}
    models.save(
        material.loaded,
        {name: _converted(name, tensor, kind) for name, tensor in dense.items()},
        out,
        quantized=material.quantized,
    )
    if material.exact and kind != "f32" and not material.quantized:
        forms = ", ".join(sorted({form for form, _ in material.blocks.values()}))
        return [f"the matrices are held in {forms} and became {kind}; a .gguf file keeps them to the bit in their size"]
    scheme = material.loaded.fingerprint.partition("+")[2]
    if scheme:
        return [f"the matrices that {scheme} made of the base, which the adapter was trained over, became dense {kind}"]
    return []


def read_back(material: Material, out: Path) -> LoadedModel:
    """The model that the directory holds."""
    return models.load(out, dtype=material.loaded.model.dtype, device=material.loaded.model.device)


def _converted(name: str, tensor: Tensor, kind: str) -> Tensor:
    converted = tensor.detach().to(_DTYPES[kind])
    if not bool(converted.isfinite().all()):
        raise InputError(
            f"{name}: expected finite weights of at most {torch.finfo(_DTYPES[kind]).max:g} for {kind}, "
            f"got {tensor.abs().max().item():g}",
            "--type bf16 and f32 hold larger numbers",
        )
    return converted
