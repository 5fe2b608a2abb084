"""The adapter alone, as PEFT's `adapter_config.json` and `adapter_model.safetensors`, for transformers and servers."""

from pathlib import Path

from ftkit import adapters, models, plugins
from ftkit.errors import InputError
from ftkit.export._material import Material
from ftkit.models import LoadedModel

TYPES = ("f32",)
DEFAULT_TYPE = "f32"
SUFFIX = ""


def write(material: Material, out: Path, kind: str) -> list[str]:  # noqa: ARG001
    """Writes the adapter to the directory `out`.

    Raises InputError when there is no adapter, and for a method that PEFT does not have.
    """
    if material.adapter_id is None:
        raise InputError("--to peft: expected an adapter, got a model without one", "--adapter DIR, or name a run")
    loaded = material.loaded
    method = loaded.model.attached[material.adapter_id].method
    module = plugins.load("adapters", method)
    if module.PEFT_TYPE is None or not getattr(module, "PEFT_READS", True):
        raise InputError(
            f"--to peft: expected a method that PEFT has, got {method!r}", "--to safetensors writes the merged model"
        )
    adapters.save(loaded.model, material.adapter_id, out, loaded.fingerprint, loaded.name)
    return []


def read_back(material: Material, out: Path) -> LoadedModel:
    """The base model with the adapter that the directory holds, merged."""
    loaded = material.loaded
    again = models.load(loaded.path, dtype=loaded.model.dtype, device=loaded.model.device, quant=loaded.quant)
    adapters.load(again.model, out, 0, any_base=False)
    return again
