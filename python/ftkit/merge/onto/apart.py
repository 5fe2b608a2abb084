"""Keep the adapter apart: the base as it is, to the bit, and the whole adapter beside it.

    y = x Wᵀ + s (x Aᵀ) Bᵀ

Nothing is merged and nothing is lost; a product more is computed for each layer.
"""

from dataclasses import replace
from pathlib import Path

from ftkit import adapters
from ftkit.errors import InputError
from ftkit.export import Material
from ftkit.models import LoadedModel


def made(material: Material, kind: str, rank: int) -> Material:  # noqa: ARG001
    """What is written: the base, and its adapter. Raises InputError for a method that changes the base itself."""
    loaded, adapter_id = material.loaded, material.adapter_id
    if adapter_id is None or loaded.model.attached[adapter_id].edits_base:
        raise InputError("--onto apart: expected one adapter that leaves the base as it is, got another")

    def beside(written: LoadedModel, folder: Path) -> None:
        adapters.save(loaded.model, adapter_id, folder, written.fingerprint, written.name)

    return replace(Material.of(loaded), beside=beside)
