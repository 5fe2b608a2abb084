"""A directory of safetensors, as transformers and most servers load it: weights, `config.json`, tokenizer, template.

Weights above five gigabytes are cut into shards with an index, as the Hub has them. Tied embeddings are written once.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ftkit.errors import InputError
from ftkit.export import Material

TYPES = ("bf16", "f16", "f32")
DEFAULT_TYPE = "bf16"

SHARD_BYTES = 5 * 10**9
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# what a model's directory may say about its tokenizer and its generation
_CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def write(material: Material, out: Path, kind: str) -> list[str]:
    """Writes the model into the directory `out`, which is there.

    Raises InputError for a type without a meaning here, and for a weight that is too large for it.
    """
    if kind not in TYPES:
        raise InputError(f"--type: expected one of {', '.join(TYPES)} for safetensors, got {kind!r}")
    shards = list(_shards(_untied(material.tensors), _DTYPES[kind].itemsize))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _converted(key, tensor, kind) for key, tensor in shard.items()}
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        size = sum(tensor.numel() for shard in shards for tensor in shard.values()) * _DTYPES[kind].itemsize
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    unquantized = {key: value for key, value in material.config.items() if key != "quantization_config"}
    unquantized.pop("torch_dtype", None)
    _write_json(out / "config.json", unquantized | {"dtype": _NAMES[kind]})
    _write_tokenizer(material, out)
    return []


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without an output matrix that is the embeddings."""
    embeddings, output = tensors.get("model.embed_tokens.weight"), tensors.get("lm_head.weight")
    tied = embeddings is not None and output is not None and embeddings.data_ptr() == output.data_ptr()
    return {name: tensor for name, tensor in tensors.items() if not (tied and name == "lm_head.weight")}


def _shards(tensors: Mapping[str, Tensor], itemsize: int) -> Iterator[dict[str, Tensor]]:
    """The weights in their order, cut where a shard would grow too large."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * itemsize
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += nbytes
    yield shard


def _converted(name: str, tensor: Tensor, kind: str) -> Tensor:
    converted = tensor.detach().cpu().to(_DTYPES[kind]).contiguous()
    if not bool(converted.isfinite().all()):
        raise InputError(
            f"{name}: expected finite weights of at most {torch.finfo(_DTYPES[kind]).max:g} for {kind}, "
            f"got {tensor.abs().max().item():g}",
            "--type bf16 and f32 hold larger numbers",
        )
    return converted


def _write_tokenizer(material: Material, out: Path) -> None:
    if material.path.is_dir():
        for name in _CARRIED:
            if (material.path / name).is_file():
                shutil.copyfile(material.path / name, out / name)
    elif material.tokenizer is not None:
        material.tokenizer.save(out, material.template)


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
