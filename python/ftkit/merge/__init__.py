"""Ways to merge adapters into weights: one file a way.

A way has `merged(base, adapted, weights) -> dict`: the base model's tensors by name, the tensors that each adapter
alone would make of them, and a weight for each adapter; it returns the tensors that differ from the base's.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ftkit import adapters, models, plugins
from ftkit.errors import InputError
from ftkit.export import Exported, Material, check_apart, check_calibration, gguf, publish

__all__ = ["merge"]


def merge(
    source: str,
    out: Path,
    *,
    folders: Sequence[Path] = (),
    weights: Sequence[float] | None = None,
    how: str = "linear",
    kind: str | None = None,
    runs_dir: Path | str = "runs",
    calibration: str | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> Exported:
    """Merges adapters (the one that a run brings, when none is given) into a directory of safetensors, or into a GGUF
    file when `out` ends so.

    One adapter of weight 1 is merged as it is trained; several are combined as `how` says. What was written is read
    back and compared with the live model. Raises InputError for what cannot be merged, and GateError, leaving nothing,
    when the written model answers differently.
    """
    way = plugins.load("merge", how)
    if out.exists() and not overwrite:
        raise InputError(f"{out}: expected a path that is free, got one that exists", "--overwrite replaces it")
    to, kind = ("gguf", kind or "source") if out.suffix == gguf.SUFFIX else ("safetensors", kind)
    check_calibration(calibration, to, kind)
    place = models.resolve(source, runs_dir)
    chosen = list(folders) or ([place.adapter] if place.adapter is not None else [])
    if not chosen:
        raise InputError(f"merge: expected an adapter for {source}, got none", "give --adapter DIR, or a run's name")
    shares = list(weights) if weights is not None else [1.0] * len(chosen)
    if len(shares) != len(chosen):
        raise InputError(f"--weight: expected one for each of {len(chosen)} adapters, got {len(shares)}")
    check_apart(out, [place.path, *chosen])
    report(f"loading {place.path}")
    # one is merged into what its base is held as; several are summed as dense matrices
    loaded = models.load(place, quant=models.scheme_at_rest(place) if shares == [1.0] else None)
    for number, folder in enumerate(chosen):
        adapters.load(loaded.model, folder, number)
    if shares == [1.0]:
        material = Material.of(loaded, 0)
    else:
        if (loaded.model.fingerprint is not None and "+" in loaded.model.fingerprint) or models.formats(place, "none"):
            raise InputError(
                f"merge: expected one adapter of weight 1 over a quantized base, got weights {shares}",
                "each adapter belongs to what its scheme made of the base; merge it alone first",
            )
        base = loaded.model.tensors()
        edits = [number for number in range(len(chosen)) if loaded.model.attached[number].edits_base]
        if edits:
            raise InputError(f"{chosen[edits[0]]}: expected an adapter that leaves the base as it is, got another")
        made = way.merged(base, [adapters.merged(loaded.model, number) for number in range(len(chosen))], shares)
        for number in range(len(chosen)):
            adapters.detach(loaded.model, number)
        material = Material(
            loaded=_with(loaded, made), adapter_id=None, tensors=loaded.model.tensors(), changed=frozenset(made)
        )
    return publish(material, out, to=to, kind=kind, calibration=calibration, overwrite=overwrite, report=report)


def _with(loaded: models.LoadedModel, tensors: Mapping[str, Tensor]) -> models.LoadedModel:
    """The live model with other weights: what the written one is compared with."""
    held = loaded.model.tensors()
    new = sorted(tensors.keys() - held.keys())
    if new:
        raise InputError(
            f"merge: expected adapters of the base's own weights, got one that makes {new[0]}",
            "it changes a head that is tied to the embedding; such an adapter is merged alone",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            held[name].copy_(tensor)
    return loaded
