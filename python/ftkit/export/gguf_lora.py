"""The adapter alone, as a GGUF file that llama.cpp lays over a base model: `llama-server -m BASE.gguf --lora FILE`.

For each adapted matrix `NAME.lora_a` [rank, in] and `NAME.lora_b` [out, rank], under GGUF's name of the matrix, the
rows of B in GGUF's order. llama.cpp computes

    y = W x + (alpha / rank) B (A x)        alpha: one for the file, rank: that of each B

so a scale that isn't alpha / rank (rsLoRA, alphas of single layers) is multiplied into B.

Source: llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.cpp`.
"""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ftkit import adapters, models
from ftkit._core import GgufFile, GgufWriter
from ftkit.errors import InputError
from ftkit.export import _gguf_architecture
from ftkit.export._gguf_types import mixture
from ftkit.export._material import Material
from ftkit.models import LoadedModel
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import Linear

TYPES = ("f32", "f16", "bf16")
DEFAULT_TYPE = "f32"
SUFFIX = ".gguf"

_QUANTIZATION_VERSION = 2
_WHOLE = "--to gguf writes the merged model"


def write(material: Material, out: Path, kind: str) -> list[str]:
    """Writes the adapter to the file `out`, which appears whole or not at all.

    Raises InputError when there is no adapter, and for one that is more than LoRAs on matrices that GGUF names.
    """
    if material.adapter_id is None:
        raise InputError("--to gguf-lora: expected an adapter, got a model without one", "--adapter DIR, or name a run")
    loaded = material.loaded
    config, family = loaded.config, models.family(loaded.config.family)
    loras = _loras(loaded.model, material.adapter_id)
    alphas = Counter(scale * len(a) for a, _, scale in loras.values())
    alpha = alphas.most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for name, (a, b, scale) in loras.items():
        own = scale * len(a)
        stem = family.gguf_name(f"{name}.weight")
        tensors[f"{stem}.lora_a"] = a
        tensors[f"{stem}.lora_b"] = family.to_gguf(config, f"{name}.weight", b if own == alpha else b * (own / alpha))
    metadata = [
        ("general.architecture", "string", _gguf_architecture.architecture(config)),
        ("general.type", "string", "adapter"),
        ("general.name", "string", loaded.path.resolve().name),
        ("general.file_type", "u32", mixture(kind).file_type),
        ("general.quantization_version", "u32", _QUANTIZATION_VERSION),
        ("adapter.type", "string", "lora"),
        ("adapter.lora.alpha", "f32", alpha),
    ]
    writer = GgufWriter(out, metadata, [(name, tuple(tensor.shape), kind) for name, tensor in tensors.items()])
    for name, tensor in tensors.items():
        writer.write(name, tensor.detach().float().cpu().contiguous())
    writer.finish()
    remarks = []
    if len(alphas) > 1:
        folded = sum(alphas.values()) - alphas[alpha]
        remarks.append(f"{folded} of {len(loras)} layers have another alpha than {alpha:g}: it is multiplied into B")
    if "+" in loaded.fingerprint:
        remarks.append(
            f"the adapter was trained over {loaded.fingerprint.partition('+')[2]} of the base; over another form of it "
            "llama.cpp answers a little otherwise"
        )
    return remarks


def read_back(material: Material, out: Path) -> LoadedModel:
    """The base model with the LoRAs that the file holds."""
    loaded = material.loaded
    again = models.load(loaded.path, dtype=loaded.model.dtype, device=loaded.model.device, quant=loaded.quant)
    family, config = models.family(loaded.config.family), loaded.config
    file = GgufFile(out)
    shapes = {name: shape for name, shape, _ in file.tensors}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in again.model.linears():
        stem = family.gguf_name(f"{name}.weight")
        if f"{stem}.lora_a" in shapes:
            a, b = (torch.empty(shapes[f"{stem}.lora_{part}"]) for part in "ab")
            file.read(f"{stem}.lora_a", a)
            file.read(f"{stem}.lora_b", b)
            found[name] = a, family.of_gguf(config, f"{name}.weight", b)
    options = {
        "alpha": file.metadata["adapter.lora.alpha"],
        "target_modules": tuple(found),
        "rank_pattern": {name: len(a) for name, (a, _) in found.items()},
    }
    adapters.attach(again.model, "lora", options, seed=0)
    parameters = adapters.trainable(again.model)
    with torch.no_grad():
        for name, (a, b) in found.items():
            parameters[f"{name}.lora_A"].copy_(a)
            parameters[f"{name}.lora_B"].copy_(b)
    again.model.eval()
    return again


def _loras(model: Decoder, adapter_id: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer → A [rank, in], B [out, rank] and scale. Raises InputError, with the reason, for what is no LoRA."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    method = model.attached[adapter_id].method
    for name, layer in model.layers_by_name().items():
        if str(adapter_id) not in layer.adapters:
            continue
        adapter = layer.adapter(adapter_id) if isinstance(layer, Linear) else None
        lora = None if adapter is None else adapter.as_lora()
        if adapter is None or lora is None or adapter.bias is not None:
            raise InputError(f"--to gguf-lora: expected a LoRA on {name}, got another change by {method!r}", _WHOLE)
        if name == "lm_head" and model.config.tied_embeddings:
            raise InputError(
                "--to gguf-lora: expected no change of a head that shares the embedding's weight, got one: "
                "llama.cpp has no such matrix to lay it over",
                _WHOLE,
            )
        found[name] = lora
    return found
