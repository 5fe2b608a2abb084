"""Ways to merge adapters into weights: one file a way.

A way has `merged(base, adapted, weights) -> dict`: the base model's tensors by name, the tensors that each adapter
alone would make of them, and a weight for each adapter; it returns the tensors that differ from the base's. What
becomes of them where the result holds its matrices in few bits is another choice, and `merge/onto/` has the ways.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ftkit import adapters, models, plugins
from ftkit.errors import InputError
from ftkit.eval.parity import answers
from ftkit.export import (
    Exported,
    Material,
    Measured,
    adapter_beside,
    check_apart,
    check_calibration,
    gguf,
    measure,
    publish,
)

__all__ = ["compare", "merge"]

REQUANTIZED = "requantized"
RANK = 8
"""Of the LoRA that keeps what rounding loses: half of the usual adapter's."""


def merge(
    source: str,
    out: Path,
    *,
    folders: Sequence[Path] = (),
    weights: Sequence[float] | None = None,
    how: str = "linear",
    onto: str = REQUANTIZED,
    rank: int = RANK,
    kind: str | None = None,
    runs_dir: Path | str = "runs",
    calibration: str | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> Exported:
    """Merges adapters (the one that a run brings, when none is given) into a directory of safetensors, or into a GGUF
    file when `out` ends so.

    One adapter of weight 1 is merged as it is trained; several are combined as `how` says. Of what a GGUF file's few
    bits can't hold, `onto` decides; a LoRA of the `rank` that keeps it goes beside the file. What was written is read
    back and compared with the live model. Raises InputError for what cannot be merged, and GateError, leaving nothing,
    when the written model answers differently.
    """
    way = plugins.load("merge.onto", onto)
    if out.exists() and not overwrite:
        raise InputError(f"{out}: expected a path that is free, got one that exists", "--overwrite replaces it")
    if onto != REQUANTIZED and out.suffix != gguf.SUFFIX:
        raise InputError(
            f"--onto {onto}: expected --out with a {gguf.SUFFIX} file, got {out}",
            "a directory holds the merged weights as floats, and loses nothing that could be kept apart",
        )
    to, kind = ("gguf", kind or "source") if out.suffix == gguf.SUFFIX else ("safetensors", kind)
    check_calibration(calibration, to, kind)
    place, chosen = _chosen(source, folders, runs_dir)
    for path in [out] if onto == REQUANTIZED else [out, adapter_beside(out)]:
        check_apart(path, [place.path, *chosen])
    material = _live(place, chosen, weights, how, report, remember=out.suffix == gguf.SUFFIX)
    if to == "gguf":
        material = way.made(material, kind or "source", rank)
    return publish(material, out, to=to, kind=kind, calibration=calibration, overwrite=overwrite, report=report)


def compare(
    source: str,
    *,
    folders: Sequence[Path] = (),
    rank: int = RANK,
    kind: str | None = None,
    runs_dir: Path | str = "runs",
    report: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> dict[str, Measured]:
    """Each way in `merge/onto/` to bring one adapter into a GGUF file of the type, measured; nothing stays written.

    Raises InputError for what cannot be merged in one of the ways.
    """
    place, chosen = _chosen(source, folders, runs_dir)
    if len(chosen) != 1:
        raise InputError(f"--compare: expected one adapter, got {len(chosen)}")
    material, kind = _live(place, chosen, None, "linear", report), kind or "source"
    loaded = material.loaded
    live = answers(loaded, loaded.tokenizer)
    material = replace(material, base=answers(loaded, loaded.tokenizer, adapted=False))
    found = {}
    for onto in plugins.names("merge.onto"):
        report(f"measuring {onto}")
        with tempfile.TemporaryDirectory(prefix="ftkit-") as folder:
            places = [Path(folder) / "model.gguf", Path(folder) / "adapter"]
            made = plugins.load("merge.onto", onto).made(material, kind, rank)
            found[onto] = measure(made, places, live, to="gguf", kind=kind)
    return found


def _chosen(source: str, folders: Sequence[Path], runs_dir: Path | str) -> tuple[models.Source, list[Path]]:
    """The model, and the adapters that are meant."""
    place = models.resolve(source, runs_dir)
    chosen = list(folders) or ([place.adapter] if place.adapter is not None else [])
    if not chosen:
        raise InputError(f"merge: expected an adapter for {source}, got none", "give --adapter DIR, or a run's name")
    return place, chosen


def _live(
    place: models.Source,
    chosen: list[Path],
    weights: Sequence[float] | None,
    how: str,
    report: Callable[[str], None],
    *,
    remember: bool = False,
) -> Material:
    """The model under its adapter, or with the sum of several in its weights; then, to `remember`, with what it said
    before."""
    way = plugins.load("merge", how)
    shares = list(weights) if weights is not None else [1.0] * len(chosen)
    if len(shares) != len(chosen):
        raise InputError(f"--weight: expected one for each of {len(chosen)} adapters, got {len(shares)}")
    report(f"loading {place.path}")
    # one is merged into what its base is held as; several are summed as dense matrices
    loaded = models.load(place, quant=models.scheme_at_rest(place) if shares == [1.0] else None)
    for number, folder in enumerate(chosen):
        adapters.load(loaded.model, folder, number)
    if shares == [1.0]:
        return Material.of(loaded, 0)
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
    before = answers(loaded, loaded.tokenizer) if remember else None
    return Material(
        loaded=_with(loaded, made),
        adapter_id=None,
        tensors=loaded.model.tensors(),
        changed=frozenset(made),
        base=before,
    )


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
