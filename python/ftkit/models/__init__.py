"""Model families: one file a family, from its configuration to modules and weight names.

loaded = models.load("model.gguf")            weights, tokenizer, chat template
hidden = loaded.model(batch)                  [T, d]
logits = loaded.model.head(hidden)            [T, vocabulary]
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ftkit import _core, plugins
from ftkit.errors import InputError
from ftkit.models._family import Family, family, family_of_gguf, family_of_hf
from ftkit.models._prequantized import Prequantized, serialized
from ftkit.models._quantized import STAY_DENSE, Converted, scheme_of
from ftkit.models._source import Source, resolve
from ftkit.models._texts import template_of, tokenizer_of
from ftkit.models._weights import Gguf, Safetensors, Weights, read_json
from ftkit.nn.decoder import Decoder, DecoderConfig, Maker, shapes
from ftkit.nn.linear import Weight

__all__ = [
    "LoadedModel",
    "Source",
    "build",
    "config_of",
    "config_of_file",
    "family",
    "family_of_hf",
    "formats",
    "formats_of",
    "load",
    "resolve",
    "save",
    "scheme_at_rest",
    "template_of",
    "tokenizer_of",
]


DENSE = "none"
"""The scheme of dense weights."""


@dataclass(kw_only=True)
class LoadedModel:
    """A model, and what belongs to it on disk."""

    model: Decoder
    path: Path
    """The directory or the .gguf file."""
    name: str
    fingerprint: str
    """Tells base models apart; an adapter remembers it."""
    quant: str = DENSE
    """How it was asked to hold its matrices, as `load` takes it."""

    @property
    def config(self) -> DecoderConfig:
        """The model's configuration."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> _core.Tokenizer:
        """The model's tokenizer."""
        return tokenizer_of(self.path)

    @functools.cached_property
    def template(self) -> _core.ChatTemplate | None:
        """The model's chat template; None for a model without one."""
        return template_of(self.path)

    def hf_config(self) -> dict[str, Any]:
        """The content of the model's config.json; made from its configuration when it comes from GGUF."""
        if self.path.is_dir():
            return read_json(self.path / "config.json")
        return family(self.config.family).to_hf(self.config)


def load(
    source: str | Path | Source,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quant: str | None = None,
) -> LoadedModel:
    """A model with its weights, frozen, in `dtype` on `device`.

    `quant`: how its matrices are held, `none` for dense ones or a scheme in `ftkit.quant`; not given, it is the one
    that the base of a run was converted to, else `none`. Matrices that a directory of safetensors holds quantized stay
    as they are under `none`. Raises InputError, with all that is wrong, when weights are missing, superfluous, of
    another shape or not finite, and for a scheme that cannot hold this model.
    """
    place = source if isinstance(source, Source) else resolve(source)
    quant = quant or place.quant or DENSE
    config, weights, owner = _open(place.path)
    names = _names(config, weights, owner)
    kinds = _formats(place.path, config, weights, names, quant)
    if kinds and torch.device(device).type != "cpu":
        held = next(iter(kinds.values())) if quant == DENSE else quant
        raise InputError(
            f"{place.path}: expected the device cpu for matrices in {held}, got {device}",
            "dense ones compute anywhere (ftkit export --to safetensors makes them)",
        )
    fingerprint = weights.fingerprint()
    scheme = None if _as_they_are(weights, quant) else scheme_of(quant)
    converted = None if scheme is None else Converted(scheme, fingerprint, place.path, dtype)
    sides = dict(shapes(config))
    problems = _problems(config, weights, names)
    read: dict[str, Tensor] = {}
    kept: dict[str, Weight] = {}
    if not problems:
        for name, stored in names.items():
            try:
                if stored in kinds and converted is not None:
                    whole = functools.partial(_read, owner, config, weights, name, stored)
                    kept[name] = converted.weight(name, (sides[name][0], sides[name][1]), whole)
                    continue
                if stored in kinds and isinstance(weights, Prequantized):
                    kept[name] = weights.weight(stored, dtype)
                    continue
                if stored in kinds and isinstance(weights, Gguf):
                    kept[name] = _stored(quant, owner, config, name, weights.blocks(stored), kinds[stored], dtype)
                    continue
                read[name] = _read(owner, config, weights, name, stored, dtype).to(device)
            except InputError as error:
                problems.append(error.message)
    if problems:
        raise InputError(f"{place.path}: expected the weights of its configuration, got\n  " + "\n  ".join(problems))
    model = Decoder(config, Maker(lambda name, _: read.pop(name), config.norm_epsilon, kept.get)).eval()
    model.rotary.to(device)
    # what a scheme makes of the weights is another base: an adapter makes up for its errors
    model.fingerprint = fingerprint if scheme is None else f"{fingerprint}+{scheme.name}"
    return LoadedModel(model=model, path=place.path, name=place.name, fingerprint=model.fingerprint, quant=quant)


def scheme_at_rest(source: Source, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """How a model's matrices are held where nothing is trained: as the run's base was, or a GGUF file's in their blocks
    where the core multiplies with blocks, which gives the same to the bit."""
    blocks = source.path.suffix == ".gguf" and torch.device(device).type == "cpu" and dtype == torch.float32
    return source.quant or ("gguf" if blocks else DENSE)


def build(
    config: DecoderConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quant: str = DENSE,
    formats: Mapping[str, str] | None = None,
) -> Decoder:
    """A model of this configuration whose weights hold whatever memory held; no file is read.

    `formats`: published name → format of the matrices that `load` would hold as `quant` does, from `formats`.
    """
    owner, sides, kinds = family(config.family), dict(shapes(config)), formats or {}
    rows = {name: (size, nbytes) for name, size, nbytes in _core.quant_formats()}

    def stored(name: str) -> Weight | None:
        if name not in kinds:
            return None
        scheme = scheme_of(kinds[name] if quant == DENSE else quant)
        if scheme is not None:
            empty: Weight = scheme.empty((sides[name][0], sides[name][1]), dtype)
            return empty
        size, nbytes = rows[kinds[name]]
        blocks = torch.empty(sides[name][0], sides[name][1] // size * nbytes, dtype=torch.uint8)
        return _stored(quant, owner, config, name, blocks, kinds[name], dtype)

    make = Maker(lambda _, shape: torch.empty(shape, dtype=dtype, device=device), config.norm_epsilon, stored)
    model = Decoder(config, make).eval()
    model.rotary.to(device)  # the rest is made where it belongs
    return model


def config_of(source: str | Path | Source) -> DecoderConfig:
    """The configuration of a model, without reading its weights."""
    place = source if isinstance(source, Source) else resolve(source)
    return _open(place.path)[0]


def config_of_file(path: Path) -> DecoderConfig:
    """The configuration that a config.json says, without a model beside it. Raises InputError for another file."""
    return _of_table(read_json(path), path)[0]


def formats(source: str | Path | Source, quant: str) -> dict[str, str]:
    """Published name → format of the matrices that `load` holds as the scheme `quant` does; no tensor is read."""
    place = source if isinstance(source, Source) else resolve(source)
    config, weights, owner = _open(place.path)
    names = _names(config, weights, owner)
    kinds = _formats(place.path, config, weights, names, quant)
    return {name: kinds[stored] for name, stored in names.items() if stored in kinds}


def formats_of(config: DecoderConfig, quant: str) -> dict[str, str]:
    """The same for a model in dense matrices that need not be here.

    Raises InputError for a scheme that leaves matrices as a file has them.
    """
    if quant == DENSE:
        return {}
    if scheme_of(quant) is None:
        raise InputError(f"--quant {quant}: expected a scheme that matrices are converted to, without a file of blocks")
    return {name: quant for name, shape in shapes(config) if len(shape) == 2 and name not in STAY_DENSE}


def save(
    loaded: LoadedModel, tensors: dict[str, Tensor], folder: Path, quantized: Mapping[str, Weight] | None = None
) -> None:
    """Writes `tensors` (by published names) with the model's config.json, tokenizer and template to a new directory.

    The result is a model that `load` and transformers read. Shards have 5 GB at most. `quantized`: matrices beside
    `tensors` that are held in one scheme, written as the library does whose scheme it is.
    """
    folder.mkdir(parents=True)
    dtype = next(iter(tensors.values())).dtype
    table = loaded.hf_config() | {"dtype": str(dtype).removeprefix("torch."), "vocab_size": loaded.config.vocab_size}
    table["tie_word_embeddings"] = "lm_head.weight" not in {*tensors, *(quantized or {})}
    table.pop("torch_dtype", None)
    table.pop("quantization_config", None)
    if quantized:
        dense = [name for name in loaded.model.linears() if f"{name}.weight" not in quantized]
        more, table["quantization_config"] = serialized(quantized, dtype, dense)
        tensors = tensors | more
    (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    _save_shards(tensors, folder, 5 * 10**9)
    generation = loaded.path / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())
    loaded.tokenizer.save(folder, loaded.template)


def _save_shards(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    home: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        home |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open(path: Path) -> tuple[DecoderConfig, Weights, Family]:
    if path.is_file():
        weights = Gguf(path)
        metadata = weights.file.metadata
        owner = family_of_gguf(metadata)

        def read(name: str) -> Tensor:
            return weights.read(name, torch.float32)

        try:
            return owner.from_gguf(metadata, weights.shapes, read), weights, owner
        except InputError as error:
            raise InputError(f"{path}: {error.message}", error.hint) from None
    table = read_json(path / "config.json")
    config, owner = _of_table(table, path / "config.json")
    quantized = table.get("quantization_config")
    if quantized is None:
        return config, Safetensors(path), owner
    if not isinstance(quantized, dict):
        raise InputError(f"{path / 'config.json'}: quantization_config: expected an object, got {quantized!r}")
    return config, Prequantized(path, quantized), owner


def _of_table(table: dict[str, Any], path: Path) -> tuple[DecoderConfig, Family]:
    """What a config.json says."""
    try:
        owner = family_of_hf(table)
        return owner.from_hf(table), owner
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from None


def _formats(
    path: Path, config: DecoderConfig, weights: Weights, names: Mapping[str, str], quant: str
) -> dict[str, str]:
    """The file's name → block format, or scheme, of the matrices that are not held dense."""
    if isinstance(weights, Prequantized) and _as_they_are(weights, quant):
        return dict.fromkeys(weights.sides, weights.scheme)
    if quant == DENSE:
        return {}
    if scheme_of(quant) is not None:
        return {names[name]: quant for name in formats_of(config, quant)}
    if not isinstance(weights, Gguf):
        raise InputError(f"--quant {quant}: expected a .gguf file, got {path}", f"ftkit export {path} --to gguf")
    return weights.formats


def _as_they_are(weights: Weights, quant: str) -> bool:
    """Whether nothing is converted."""
    return quant == DENSE or (isinstance(weights, Prequantized) and quant == weights.scheme)


def _stored(
    quant: str, owner: Family, config: DecoderConfig, name: str, blocks: Tensor, kind: str, dtype: torch.dtype
) -> Weight:
    """A matrix held as its blocks.

    Rows that the family keeps in another order are put in order by copying their blocks: only these are not mapped,
    and no product pays for it.
    """
    ordered = owner.of_gguf(config, name, blocks)
    weight: Weight = plugins.load("quant", quant).GgufWeight(ordered, kind, dtype, mapped=ordered is blocks)
    return weight


def _read(
    owner: Family,
    config: DecoderConfig,
    weights: Weights,
    name: str,
    stored: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight `name` in its published order of rows; as it is mapped where no type is given."""
    tensor = weights.read_mapped(stored) if dtype is None else weights.read(stored, dtype)
    return owner.of_gguf(config, name, tensor) if _is_gguf(weights) else tensor


def _is_gguf(weights: Weights) -> bool:
    return isinstance(weights, Gguf)


def _names(config: DecoderConfig, weights: Weights, owner: Family) -> dict[str, str]:
    """Published name of each weight → its name in the file."""
    return {name: owner.gguf_name(name) if _is_gguf(weights) else name for name, _ in shapes(config)}


def _problems(config: DecoderConfig, weights: Weights, names: dict[str, str]) -> list[str]:
    """What is missing, superfluous or of another shape."""
    problems = []
    for name, shape in shapes(config):
        found = weights.shapes.get(names[name])
        if found is None:
            problems.append(f"{names[name]}: expected shape {shape}, got nothing")
        elif found != shape:
            problems.append(f"{names[name]}: expected shape {shape}, got {found}")
    known = set(names.values()) | {"rope_freqs.weight"}
    for name in weights.shapes:
        if name in known or name.endswith(".rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and config.tied_embeddings:
            embedding, head = (weights.read(n, torch.float32) for n in ("model.embed_tokens.weight", name))
            if not torch.equal(embedding, head):
                problems.append(f"{name}: expected the embedding's values, since both are tied, got others")
            continue
        problems.append(f"{name}: expected no such weight")
    return problems
