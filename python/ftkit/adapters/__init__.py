"""Finetuning methods: one file a method.

    adapters.attach(model, "lora", {"rank": 16}, seed=0)     trainable, and the model's outputs are as before
    adapters.trainable(model, 0)                             name → parameter
    adapters.save(model, 0, Path("adapter"))                 PEFT's format, and ftkit.json
    adapters.load(model, Path("adapter"), 1)                 beside the first, for rows with adapter id 1

A method's file has `Config`, `PEFT_TYPE`, `PEFT_KEYS` (parameter → the end of its key in a PEFT file), `attach`,
`to_peft` and `of_peft`. A model's outputs are as before when an adapter is attached, unless the file's docstring says
otherwise and why. The file may have `scheme_for(source, options)`, how a base is held that no `--quant` is given for;
`notices(model, config)`, what people should know of what was attached; and `PEFT_READS = False`, for files in PEFT's
format that PEFT itself cannot use.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftkit import plugins
from ftkit.adapters import _files
from ftkit.adapters._files import Snapshot, snapshot
from ftkit.config import fields
from ftkit.config.fields import Problem, table_of
from ftkit.errors import InputError
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import Linear, Weight

__all__ = [
    "Attached",
    "Snapshot",
    "attach",
    "content",
    "detach",
    "file_keys",
    "load",
    "merged",
    "merged_weights",
    "notices",
    "read",
    "save",
    "snapshot",
    "trainable",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attached:
    """What is known of an adapter on a model."""

    method: str
    config: Any
    """The method's settings, an instance of its `Config`."""
    edits_base: bool
    """Training it changes the base model's own memory."""


def attach(model: Decoder, method: str, config: Mapping[str, Any], seed: int, adapter_id: int = 0) -> None:
    """Puts a new adapter on the model, trainable, for rows of this id.

    `config`: the options of the method's `Config`; `seed` decides its first weights. Raises InputError for an unknown
    method, bad options, or an id that is taken.
    """
    if adapter_id < 0:
        raise InputError(f"adapter id: expected at least 0, got {adapter_id}")
    if adapter_id in model.attached:
        raise InputError(f"adapter id: expected a free one, got {adapter_id}", "detach that adapter first")
    module = plugins.load("adapters", method)
    problems: list[Problem] = []
    settings = fields.read(module.Config, dict(config), (), problems)
    if settings is None:
        lines = [": ".join(filter(None, (".".join(problem.path), problem.message))) for problem in problems]
        raise InputError(f"method {method!r}: " + "\n  ".join(lines))
    edits = getattr(settings, "keep_base", True) is False
    try:
        module.attach(model, settings, seed, adapter_id)
    except InputError:
        _remove(model, adapter_id)
        raise
    model.attached[adapter_id] = Attached(method=method, config=settings, edits_base=edits)
    for layer in model.layers_by_name().values():
        if str(adapter_id) in layer.adapters:
            layer.adapters[str(adapter_id)].train(model.training)


def detach(model: Decoder, adapter_id: int) -> None:
    """Takes an adapter off the model. What it changed in the base itself (`full` without `keep_base`) stays."""
    _known(model, adapter_id)
    _remove(model, adapter_id)
    del model.attached[adapter_id]


def trainable(model: Decoder, adapter_id: int = 0) -> dict[str, nn.Parameter]:
    """Name → parameter of an adapter, such as `model.layers.0.mlp.up_proj.lora_A`; shared parameters once."""
    _known(model, adapter_id)
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in _all_parameters(model, adapter_id).items():
        found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def merged(model: Decoder, adapter_id: int = 0) -> dict[str, Tensor]:
    """The weights of a model without adapters that does what this one does under the adapter, by published names.

    Unchanged weights are the base's memory. A tied head that the adapter changes comes out as a weight of its own.
    """
    _known(model, adapter_id)
    found = model.tensors()
    key = str(adapter_id)
    with torch.no_grad():
        for name, layer in model.layers_by_name().items():
            if key not in layer.adapters:
                continue
            adapter: Any = layer.adapters[key]
            dense = adapter.merged(layer.weight) if isinstance(layer, Linear) else adapter.dense.detach()
            found[f"{name}.weight"] = dense
            if isinstance(layer, Linear) and adapter.bias is not None:
                found[f"{name}.bias"] = adapter.bias.detach()
    if model.config.tied_embeddings:
        embedding = found["model.embed_tokens.weight"]
        head = found.get("lm_head.weight")
        if head is None and key in model.embed_tokens.adapters:
            found["lm_head.weight"] = model.lm_head.weight.dense()
        elif head is not None and head.data_ptr() == embedding.data_ptr():
            del found["lm_head.weight"]
    return found


def merged_weights(model: Decoder, adapter_id: int = 0) -> dict[str, Weight]:
    """By published name, the merged matrices whose codes hold them to the bit."""
    _known(model, adapter_id)
    found: dict[str, Weight] = {}
    for name, linear in model.linears().items():
        adapter = linear.adapter(adapter_id)
        weight = None if adapter is None else adapter.merged_weight(linear.weight)
        if weight is not None:
            found[f"{name}.weight"] = weight
    return found


def notices(model: Decoder, adapter_id: int = 0) -> list[str]:
    """What people should know of how an adapter was attached."""
    attached = _known(model, adapter_id)
    told = getattr(plugins.load("adapters", attached.method), "notices", None)
    return [] if told is None else list(told(model, attached.config))


def save(
    model: Decoder, adapter_id: int, folder: Path | None, base_fingerprint: str | None = None, base_name: str = ""
) -> None:
    """Writes the adapter to a new directory: PEFT's two files, and ftkit.json with the base's fingerprint.

    Without a folder it takes part in gathering what processes share out, and another one writes.
    `base_fingerprint`: that of the model's weights when not given; `base_name`: what the base was loaded as.
    """
    attached = _known(model, adapter_id)
    module = plugins.load("adapters", attached.method)
    # peft expects a tied head's weight beside the embedding's
    parameters = _all_parameters(model, adapter_id) if module.PEFT_TYPE else trainable(model, adapter_id)
    tensors = {}
    for name, parameter in parameters.items():
        layer, _, inner = name.rpartition(".")
        tensors[f"{_files.PREFIX}{layer}.{module.PEFT_KEYS.get(inner, inner)}"] = parameter
    record = {
        "method": attached.method,
        "config": table_of(attached.config),
        "base_fingerprint": base_fingerprint or model.fingerprint,
        "base": base_name,
    }
    _files.write(folder, tensors, module.PEFT_TYPE, module.to_peft(model, attached.config), record)


def load(model: Decoder, folder: Path, adapter_id: int = 0, *, trainable: bool = False, any_base: bool = False) -> None:
    """Puts an adapter from disk on the model, for rows of this id; one from PEFT, too.

    Frozen unless `trainable`. Raises InputError when keys are missing or superfluous, shapes differ, values are not
    finite, or it was trained on another base and `any_base` is not set.
    """
    files = _files.read(folder)
    base = files.record.get("base_fingerprint")
    if base is not None and model.fingerprint is not None and base != model.fingerprint and not any_base:
        raise InputError(
            f"{folder}: expected an adapter for this base model, {model.fingerprint}, got one for {base}",
            _trained_over(str(base), model.fingerprint) or f"it was trained on {files.record.get('base') or 'another'}",
        )
    method = _method(folder, files)
    module = plugins.load("adapters", method)
    if module.PEFT_TYPE is not None and files.config.get("peft_type") != module.PEFT_TYPE:
        raise InputError(f"{folder}: expected peft_type {module.PEFT_TYPE!r}, got {files.config.get('peft_type')!r}")
    options = dict(files.record.get("config") or {}) | module.of_peft(files.config, list(files.tensors))
    attach(model, method, options, 0, adapter_id)
    try:
        _fill(folder, files.tensors, _trainable(model, adapter_id), module.PEFT_KEYS)
    except InputError:
        detach(model, adapter_id)
        raise
    for parameter in _trainable(model, adapter_id).values():
        parameter.requires_grad_(trainable)


def read(shell: Decoder, folder: Path) -> tuple[Attached, dict[str, nn.Module]]:
    """An adapter from disk that is put on no model: what is known of it, and its part of each layer by name.

    `shell` is a model's (`Decoder.shell`) and is as before afterwards. Raises InputError as `load` does.
    """
    load(shell, folder, 0)
    key = "0"
    found = {name: layer.adapters[key] for name, layer in shell.layers_by_name().items() if key in layer.adapters}
    attached = _known(shell, 0)
    detach(shell, 0)
    return attached, found


def file_keys(attached: Attached, modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The key that each parameter, by its `id`, has in its adapter's file; `attached` and `modules` as of `read`."""
    ends = plugins.load("adapters", attached.method).PEFT_KEYS
    return {
        id(parameter): f"{_files.PREFIX}{name}.{ends.get(inner, inner)}"
        for name, module in modules.items()
        for inner, parameter in module.named_parameters()
    }


def content(folder: Path) -> str:
    """A hash of what `load` reads of a directory: the same for the same adapter, wherever it stands. Raises InputError
    when it cannot be read."""
    return _files.snapshot(folder).content


def _trained_over(base: str, fingerprint: str) -> str | None:
    """What to do with an adapter over what another scheme made of the same weights; None when they are others."""
    (theirs, scheme), (ours, held) = (text.partition("+")[::2] for text in (base, fingerprint))
    if theirs != ours:
        return None
    if not scheme:
        return f"it was trained over the model's own weights, not over what {held} made of them; name the model instead"
    return (
        f"it was trained over what {scheme} made of these weights; name its run, or --quant {scheme} where there is one"
    )


_trainable = trainable  # which `load` has an argument of the same name for


def _fill(
    folder: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], ends: Mapping[str, str]
) -> None:
    """Copies the file's tensors to the parameters, all or none."""
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    problems = []
    rest = dict(tensors)
    for name, parameter in parameters.items():
        layer, _, inner = name.rpartition(".")
        key = f"{_files.PREFIX}{layer}.{ends.get(inner, inner)}"
        tensor = rest.pop(key, None)
        if tensor is None:
            problems.append(f"{key}: expected shape {tuple(parameter.shape)}, got nothing")
        elif tensor.shape != parameter.shape:
            problems.append(f"{key}: expected shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key}: expected finite values, got NaN or infinite ones")
        else:
            pairs.append((parameter, tensor))
    known = {id(parameter): tensor for parameter, tensor in pairs}
    for key, extra in rest.items():
        if not _same_as_tied(key, extra, parameters, known):
            problems.append(f"{key}: expected no such key")
    if problems:
        raise InputError(f"{folder}: expected the adapter's weights, got\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for parameter, values in pairs:
            parameter.copy_(values)


def _same_as_tied(
    key: str, tensor: Tensor, parameters: Mapping[str, nn.Parameter], known: Mapping[int, Tensor]
) -> bool:
    """Whether the key is the head's copy of a tied, trained embedding, as PEFT writes it."""
    embedding = parameters.get("model.embed_tokens.weight")
    tied = known.get(id(embedding))
    return key == f"{_files.PREFIX}lm_head.weight" and tied is not None and torch.equal(tied, tensor)


def _method(folder: Path, files: _files.Files) -> str:
    """The method of an adapter on disk."""
    recorded = files.record.get("method")
    if recorded is not None:
        return str(recorded)
    kind = files.config.get("peft_type")
    kinds = {plugins.load("adapters", name).PEFT_TYPE: name for name in plugins.names("adapters")}
    if not isinstance(kind, str) or kind not in kinds:
        known = ", ".join(sorted(key for key in kinds if key))
        raise InputError(f"{folder}: expected a peft_type of {known}, got {kind!r}")
    return kinds[kind]


def _all_parameters(model: Decoder, adapter_id: int) -> dict[str, nn.Parameter]:
    """Name → parameter, shared ones under each of their names."""
    return {
        f"{name}.{inner}": parameter
        for name, layer in model.layers_by_name().items()
        if str(adapter_id) in layer.adapters
        for inner, parameter in layer.adapters[str(adapter_id)].named_parameters()
    }


def _known(model: Decoder, adapter_id: int) -> Attached:
    if adapter_id not in model.attached:
        has = ", ".join(map(str, model.attached)) or "none"
        raise InputError(f"adapter id: expected one of this model ({has}), got {adapter_id}")
    attached: Attached = model.attached[adapter_id]
    return attached


def _remove(model: Decoder, adapter_id: int) -> None:
    for layer in model.layers_by_name().values():
        if str(adapter_id) in layer.adapters:
            del layer.adapters[str(adapter_id)]
