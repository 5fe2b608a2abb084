"""A GGUF file: for llama.cpp and what is built on it, and for ftkit itself.

Weights get the block formats of the type (see `_gguf_types`), and llama.cpp's names and layout. Metadata and tokenizer
of a model that comes from a GGUF file are carried over as they are, and so are its blocks where format and weights are
unchanged: exporting a file to its own type gives back the same bits. `--type source` keeps every tensor as it is held:
in the file's format, in the blocks that a scheme or an adapter's merge has for it, or in the fewest bytes of a float
that hold its values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftkit import models
from ftkit._core import GgufFile, GgufWriter, quant_formats
from ftkit.errors import InputError
from ftkit.export import _gguf_architecture, _gguf_tokenizer, _gguf_types
from ftkit.export._material import Material
from ftkit.models import LoadedModel

TYPES = ("source", *_gguf_types.TYPES)
CALIBRATED_TYPES = tuple(name for name in TYPES if name not in ("f32", "f16", "bf16"))
DEFAULT_TYPE = "f16"
SUFFIX = ".gguf"

Entry = tuple[str, str, Any]
# llama.cpp's version of its block formats
_QUANTIZATION_VERSION = 2
_FORMATS = {name: (size, nbytes) for name, size, nbytes in quant_formats()}


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A tensor of the file."""

    name: str
    form: str
    tensor: Tensor
    unchanged: bool
    """Whether the source file has the same blocks."""
    blocks: Tensor | None = None
    """The blocks, where the tensor is held in this format already."""
    importance: Tensor | None = None
    """Of its columns, where it is rounded to a block format and calibrated."""


def write(material: Material, out: Path, kind: str) -> list[str]:
    """Writes the model to the file `out`, which appears whole or not at all.

    Raises InputError for a family, tokenizer or weight that GGUF cannot hold.
    """
    source = _source(material)
    if kind == "source" and source is None and not material.blocks:
        raise InputError("--type source: expected a model from a GGUF file, got one from safetensors", "name a type")
    plan = list(_plan(material, source, kind))
    entries = [(planned.name, tuple(planned.tensor.shape), planned.form) for planned in plan]
    writer = GgufWriter(out, _metadata(material, source, kind, plan), entries)
    for planned in plan:
        if source is not None and planned.unchanged:
            size, nbytes = _FORMATS[planned.form]
            blocks = torch.empty(planned.tensor.numel() // size * nbytes, dtype=torch.uint8)
            source.read_blocks(planned.name, blocks)
            writer.write_blocks(planned.name, blocks)
        elif planned.blocks is not None:
            writer.write_blocks(planned.name, planned.blocks.cpu().contiguous())
        else:
            writer.write(planned.name, planned.tensor.detach().cpu().contiguous(), planned.importance)
    writer.finish()
    return _remarks(material, plan, kind)


def formats(material: Material, kind: str) -> dict[str, tuple[str, bool]]:
    """Published name → the weight's format in a file of this type, and whether the source's own blocks are kept."""
    plan = _plan(material, _source(material), kind)
    return {name: (planned.form, planned.unchanged) for name, planned in zip(material.tensors, plan, strict=False)}


def read_back(material: Material, out: Path) -> LoadedModel:
    """The model that the file holds."""
    return models.load(out, dtype=material.loaded.model.dtype, device=material.loaded.model.device)


def _source(material: Material) -> GgufFile | None:
    """The file that the model comes from, where it is a GGUF file."""
    path = material.loaded.path
    return GgufFile(path) if path.is_file() else None


def _plan(material: Material, source: GgufFile | None, kind: str) -> Iterator[_Planned]:
    """The tensors of the file, in the order of its data: embeddings, layers, output."""
    config = material.loaded.config
    family = models.family(config.family)
    old = {name: (tuple(shape), form) for name, shape, form in source.tensors} if source else {}
    mixture = None if kind == "source" else _gguf_types.mixture(kind)

    def planned(
        name: str,
        tensor: Tensor,
        changed: bool,
        held: tuple[str, Tensor] | None = None,
        importance: Tensor | None = None,
    ) -> _Planned:
        shape = tuple(tensor.shape)
        if mixture is not None:
            form = _gguf_types.block_format(name, shape, config.layers, mixture)
        elif held is not None:
            form = held[0]
        else:
            form = old[name][1] if name in old else _float_that_holds(tensor)
        blocks = held[1] if held is not None and held[0] == form else None
        unchanged = not changed and old.get(name) == (shape, form)
        rounded = blocks is None and not unchanged and _FORMATS[form][0] > 1
        return _Planned(
            name=name,
            form=form,
            tensor=tensor,
            unchanged=unchanged,
            blocks=blocks,
            importance=importance if rounded else None,
        )

    for name, tensor in material.tensors.items():
        held = material.blocks.get(name)
        if held is not None:
            held = held[0], family.to_gguf(config, name, held[1])
        written = family.to_gguf(config, name, tensor)
        yield planned(family.gguf_name(name), written, name in material.changed, held, material.importance(name))
    if (factors := _gguf_architecture.rope_factors(config)) is not None:
        yield planned("rope_freqs.weight", factors, False)


def _float_that_holds(tensor: Tensor) -> str:
    """The smallest float format with exactly these values; f32 for vectors, which llama.cpp wants so."""
    if tensor.dim() > 1:
        for form, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return form
    return "f32"


def _metadata(material: Material, source: GgufFile | None, kind: str, plan: list[_Planned]) -> list[Entry]:
    """The file's metadata: the source's own, or made from the configuration and the tokenizer's files."""
    own: list[Entry] = [("general.quantization_version", "u32", _QUANTIZATION_VERSION)]
    if kind != "source":
        own.append(("general.file_type", "u32", _gguf_types.mixture(kind).file_type))
    own += _calibration_entries(material, plan)
    if source is not None:
        types = source.metadata_types
        replaced = {"general.alignment", *(key for key, _, _ in own)}
        kept = [(key, types[key], value) for key, value in source.metadata.items() if key not in replaced]
        # how the source was calibrated is untrue of weights that are rounded again
        again = any(not planned.unchanged and planned.blocks is None for planned in plan)
        return [entry for entry in kept if not (again and entry[0].startswith("quantize.imatrix."))] + own
    loaded = material.loaded
    return [
        ("general.architecture", "string", _gguf_architecture.architecture(loaded.config)),
        ("general.type", "string", "model"),
        ("general.name", "string", loaded.path.resolve().name),
        *own,
        *_gguf_architecture.entries(loaded.config),
        *_gguf_tokenizer.entries(loaded.path, loaded.config.vocab_size, material.template),
    ]


def _calibration_remarks(material: Material, plan: list[_Planned]) -> list[str]:
    if material.calibration is None:
        return []
    calibrated = sum(planned.importance is not None for planned in plan)
    if not calibrated:
        return ["--calibration changed nothing: every matrix keeps the blocks that it is held in"]
    measured = f"{material.calibration.tokens:,} tokens of {material.calibration.data}"
    return [f"{calibrated} weights were rounded by what matters to {measured}", *material.calibration.remarks()]


def _calibration_entries(material: Material, plan: list[_Planned]) -> list[Entry]:
    """What llama.cpp says of a file whose scales were found with an importance matrix."""
    calibrated = sum(planned.importance is not None for planned in plan)
    if material.calibration is None or not calibrated:
        return []
    return [
        ("quantize.imatrix.dataset", "string", material.calibration.data),
        ("quantize.imatrix.entries_count", "u32", calibrated),
        ("quantize.imatrix.chunks_count", "u32", material.calibration.rows),
    ]


def _remarks(material: Material, plan: list[_Planned], kind: str) -> list[str]:
    """What was calibrated; formats that differ from the type's because rows don't divide into its blocks; blocks that
    were not kept."""
    remarks = _calibration_remarks(material, plan)
    if kind == "source":
        return remarks
    base = _gguf_types.mixture(kind).base
    size = _FORMATS[base][0]
    odd = [planned for planned in plan if planned.tensor.dim() > 1 and planned.tensor.shape[-1] % size != 0]
    if odd:
        forms = ", ".join(sorted({planned.form for planned in odd}))
        remarks.append(f"{len(odd)} of {len(plan)} weights have rows that don't divide by {size}: {forms} for {base}")
    rounded = len(material.blocks) - sum(planned.blocks is not None for planned in plan)
    if rounded and base != "f32":
        remarks.append(f"{rounded} weights were rounded again, to {base}; --type source keeps the blocks they are in")
    return remarks
