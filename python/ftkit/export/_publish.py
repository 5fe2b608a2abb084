"""Exporting: write beside the target, read back, compare with the live model, and only then take the name."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftkit import adapters, models, plugins
from ftkit.errors import GateError, InputError, did_you_mean
from ftkit.eval.parity import Answers, Bounds, Parity, answers, bounds, figures
from ftkit.export._calibration import calibrate
from ftkit.export._material import Material
from ftkit.export._quantized import quantized
from ftkit.models._quantized import scheme_of
from ftkit.train import files

# one of these is in every directory that an export may replace
_MARKS = ("config.json", "adapter_config.json")
_FLOATS = ("f32", "f16", "bf16")
_LOST = 0.5
"""The share of an adapter's effect, in KL, that rounding to its base's formats may take."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was written, compared with the live model."""

    bytes: int
    adapter_bytes: int
    """Of the adapter beside it; 0 without one."""
    parity: Parity
    without: Parity | None
    """The same for the base without its adapter, where rounding can lose what the adapter does."""
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Exported(Measured):
    """What an export made."""

    out: Path
    adapter: Path | None
    """The adapter that belongs to the written model."""

    def table(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {
            "out": str(self.out),
            "bytes": self.bytes,
            "adapter": None if self.adapter is None else str(self.adapter),
            "adapter_bytes": self.adapter_bytes,
            "parity": asdict(self.parity),
            "without_adapter": None if self.without is None else asdict(self.without),
            "remarks": list(self.remarks),
        }


def export(
    source: str,
    out: Path,
    *,
    to: str,
    kind: str | None = None,
    quant: str | None = None,
    requantize: bool = False,
    adapter: Path | None = None,
    runs_dir: Path | str = "runs",
    calibration: str | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> Exported:
    """Exports a model, with an adapter or the one that a run brings, to the target `to` as the type `kind`.

    `calibration`: a dataset; what matters while the model reads it is rounded with more care.
    `quant`: the scheme of its matrices, for a target with `QUANTS`; `requantize` allows float offsets to be rounded to
    whole zero points.

    Raises InputError for what cannot be exported, and GateError, leaving nothing, when what was written and read back
    does not answer as the live model does.
    """
    target, _ = _target(to, kind, quant)
    _check(target, out, overwrite)
    check_calibration(calibration, to, kind)
    place = models.resolve(source, runs_dir)
    check_apart(out, [place.path, adapter or place.adapter])
    report(f"loading {place.path}")
    loaded = models.load(place, quant=models.scheme_at_rest(place))
    folder = adapter or place.adapter
    if folder is not None:
        adapters.load(loaded.model, folder, 0)
    material = Material.of(loaded, None if folder is None else 0)
    return publish(
        material,
        out,
        to=to,
        kind=kind,
        calibration=calibration,
        quant=quant,
        requantize=requantize,
        overwrite=overwrite,
        report=report,
    )


def publish(
    material: Material,
    out: Path,
    *,
    to: str,
    kind: str | None = None,
    calibration: str | None = None,
    quant: str | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> Exported:
    """Writes what is exported to the target `to` as the type `kind`, if it reads back as a model that answers the same.

    Raises as `export` does.
    """
    if kind is None and material.exact and "source" in plugins.load("export", to.replace("-", "_")).TYPES:
        kind = "source"
    target, kind = _target(to, kind, quant)
    _check(target, out, overwrite)
    if calibration is not None:
        check_calibration(calibration, to, kind)
        found = calibrate(material.loaded, material.adapter_id, calibration, report)
        material = replace(material, calibration=found)
    remarks: tuple[str, ...] = ()
    if quant is not None:
        report(f"quantizing to {quant}")
        material, rounded = quantized(material, quant, requantize)
        remarks = tuple(rounded)
    beside = None if material.beside is None else adapter_beside(out)
    if beside is not None:
        _check_adapter(beside, overwrite)
    with _staged([out] if beside is None else [out, beside]) as staged:
        report(f"writing {to} {kind}, and comparing it with the live model")
        made = measure(material, staged, to=to, kind=kind)
        if not made.parity.passed:
            raise GateError(*_refusal(made, to, quant or kind))
    made = replace(made, remarks=(*remarks, *made.remarks))
    return Exported(out=out, adapter=beside, **vars(made))


def adapter_beside(out: Path) -> Path:
    """Where the adapter goes that belongs to the model at `out`."""
    return out.with_name(f"{out.stem}-adapter")


def measure(material: Material, places: Sequence[Path], live: Answers | None = None, *, to: str, kind: str) -> Measured:
    """Writes the model and the adapter beside it to new places, reads both back, and compares them with what is live.

    `live`: what the live model says, where it was asked already.
    """
    target, loaded = plugins.load("export", to.replace("-", "_")), material.loaded
    remarks = target.write(material, places[0], kind)
    back = target.read_back(material, places[0])
    if material.beside is not None:
        material.beside(back, places[1])
        adapters.load(back.model, places[1], 0)
    live = live or answers(loaded, loaded.tokenizer)
    without = _without(material, live, kind)
    return Measured(
        bytes=_size(places[0]),
        adapter_bytes=sum(map(_size, places[1:])),
        parity=figures(live, answers(back, loaded.tokenizer), _allowed(material, kind, without)),
        without=without,
        remarks=tuple(remarks),
    )


def _without(material: Material, live: Answers, kind: str) -> Parity | None:
    """How near the base without its adapter is, where the type rounds what the adapter changed."""
    model, adapter_id = material.loaded.model, material.adapter_id
    if not material.rounds or kind in _FLOATS:
        return None
    base = material.base
    if base is None and adapter_id is not None and not model.attached[adapter_id].edits_base:
        base = answers(material.loaded, material.loaded.tokenizer, adapted=False)
    return None if base is None else figures(live, base, bounds("f32"))


def _allowed(material: Material, kind: str, without: Parity | None) -> Bounds:
    """How far from the live model what is written may be."""
    if kind != "source" or material.rounded_to is not None:
        return bounds(material.rounded_to or kind)
    if not material.rounds:
        return bounds("f32")
    # in the formats that the base had, what is lost is the adapter's: of what it does, most must be left
    coarsest = bounds("q2_k")
    if without is None:
        return coarsest
    return replace(coarsest, kl_mean=min(coarsest.kl_mean, max(_LOST * without.kl_mean, bounds("f16").kl_mean)))


def _refusal(made: Measured, to: str, kind: str) -> tuple[str, str]:
    """What the gate says, and the hint."""
    parity, without = made.parity, made.without
    message = (
        f"{to} {kind}: expected what was written to answer as the model does, "
        f"got KL {parity.kl_mean:.3g} (mean) {parity.kl_max:.3g} (max), top-1 {parity.top1:.3f}"
    )
    if kind != "source" or without is None:
        return message, "a type with more bits is nearer"
    message += f", where the base without the adapter has KL {without.kl_mean:.3g}"
    if made.adapter_bytes:
        return message, "a higher --rank keeps more of what the adapter does"
    return message, "few bits can't hold it; `ftkit merge --compare` measures the ways that keep what the adapter does"


def _target(to: str, kind: str | None, quant: str | None) -> tuple[Any, str]:
    """The target, and the type to write."""
    target = plugins.load("export", to.replace("-", "_"))
    known = getattr(target, "QUANTS", ())
    if quant is not None and quant.partition(":")[0] not in known:
        can = f"one of {', '.join(known)}" if known else "none"
        raise InputError(
            f"--quant: expected {can} for {to}, got {quant!r}",
            did_you_mean(quant, known)
            if known
            else "--type says the format; --to safetensors writes nf4, fp4 and int4",
        )
    if quant is not None:
        scheme_of(quant)  # for its option
    kind = kind or str(target.DEFAULT_TYPE)
    if kind not in target.TYPES:
        known = ", ".join(target.TYPES)
        raise InputError(f"--type: expected one of {known} for {to}, got {kind!r}", did_you_mean(kind, target.TYPES))
    return target, kind


def _check(target: Any, out: Path, overwrite: bool) -> None:
    """Raises InputError for a place that cannot be written, before anything is loaded."""
    if target.SUFFIX and out.suffix != target.SUFFIX:
        raise InputError(f"--out: expected a file that ends with {target.SUFFIX}, got {out}")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: expected a path that is free, got one that exists", "--overwrite replaces it")
    if out.exists() and out.is_dir() == bool(target.SUFFIX):
        raise InputError(f"{out}: expected a {'file' if target.SUFFIX else 'directory'} to replace, got another thing")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in _MARKS):
        raise InputError(f"{out}: expected a model or an adapter to replace, got a directory without {_MARKS[0]}")


def check_calibration(path: str | None, to: str, kind: str | None) -> None:
    """Raises InputError for a type that rounds nothing by importance, and for data that isn't there."""
    if path is None:
        return
    target, kind = _target(to, kind, None)
    if kind not in getattr(target, "CALIBRATED_TYPES", ()):
        raise InputError(
            f"--calibration: expected a quantized type of gguf, got {to} {kind}", "such as --to gguf --type q4_k_m"
        )
    if path != "-" and not Path(path).exists():
        raise InputError(f"--calibration: expected a file or a directory of rows, got nothing at {path}")


def _check_adapter(folder: Path, overwrite: bool) -> None:
    """Raises InputError for a place of an adapter that cannot be written."""
    if folder.exists() and not overwrite:
        raise InputError(f"{folder}: expected a path that is free, got one that exists", "--overwrite replaces it")
    if folder.exists() and not (folder / _MARKS[1]).is_file():
        raise InputError(f"{folder}: expected an adapter to replace, got something without {_MARKS[1]}")


def check_apart(out: Path, sources: Sequence[Path | None]) -> None:
    """Raises InputError when the target is, holds or lies in what is read."""
    place = out.resolve()
    for source in filter(None, sources):
        read = source.resolve()
        if place == read or place in read.parents or read in place.parents:
            raise InputError(f"--out: expected a place apart from {source}, which is read, got {out}")


@contextmanager
def _staged(outs: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths beside `outs` that take their names, and their places, when all went well; else nothing remains of any."""
    with files.disk_errors(outs[0]):
        staged, old = ([out.parent / f".tmp-{os.getpid()}-{part}{out.name}" for out in outs] for part in ("", "old-"))
        outs[0].parent.mkdir(parents=True, exist_ok=True)
        for path in staged:
            _remove(path)
        placed: list[tuple[Path, Path]] = []
        try:
            yield staged
            for out, new, before in zip(outs, staged, old, strict=True):
                if out.exists():
                    out.rename(before)
                new.rename(out)
                placed.append((out, new))
        except BaseException:
            for out, new in placed:
                out.rename(new)
            raise
        finally:
            for out, new, before in zip(outs, staged, old, strict=True):
                _remove(new)
                if before.exists() and not out.exists():  # the last step failed
                    before.rename(out)
                _remove(before)


def _size(path: Path) -> int:
    """Bytes of a file, or of a directory's files."""
    return sum(part.stat().st_size for part in [path, *path.rglob("*")] if part.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
