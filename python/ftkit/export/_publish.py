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
from ftkit.eval.parity import Parity, bounds, compare
from ftkit.export._calibration import calibrate
from ftkit.export._material import Material
from ftkit.export._quantized import quantized
from ftkit.models._quantized import scheme_of
from ftkit.train import files

# one of these is in every directory that an export may replace
_MARKS = ("config.json", "adapter_config.json")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export made."""

    out: Path
    bytes: int
    parity: Parity
    remarks: tuple[str, ...]

    def table(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {"out": str(self.out), "bytes": self.bytes, "parity": asdict(self.parity), "remarks": list(self.remarks)}


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
    remarks: list[str] = []
    if quant is not None:
        report(f"quantizing to {quant}")
        material, remarks = quantized(material, quant, requantize)
    with _staged(out) as staged:
        report(f"writing {to} {kind}")
        remarks += target.write(material, staged, kind)
        report("comparing with the live model")
        # `source` rounds what an adapter changed to the file's formats, so its bound is that of the coarsest ones
        rounds = bool(material.changed) and not material.exact
        allowed = bounds(material.rounded_to or (kind if kind != "source" else "q2_k" if rounds else "f32"))
        parity = compare(material.loaded, target.read_back(material, staged), allowed)
        if not parity.passed:
            raise GateError(
                f"{to} {quant or kind}: expected what was written to answer as the model does, "
                f"got KL {parity.kl_mean:.3g} (mean) {parity.kl_max:.3g} (max), top-1 {parity.top1:.3f}",
                "a type with more bits is nearer",
            )
        size = sum(path.stat().st_size for path in [staged, *staged.rglob("*")] if path.is_file())
    return Exported(out=out, bytes=size, parity=parity, remarks=tuple(remarks))


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
    target, kind = _target(to, kind)
    if kind not in getattr(target, "CALIBRATED_TYPES", ()):
        raise InputError(
            f"--calibration: expected a quantized type of gguf, got {to} {kind}", "such as --to gguf --type q4_k_m"
        )
    if path != "-" and not Path(path).exists():
        raise InputError(f"--calibration: expected a file or a directory of rows, got nothing at {path}")


def check_apart(out: Path, sources: Sequence[Path | None]) -> None:
    """Raises InputError when the target is, holds or lies in what is read."""
    place = out.resolve()
    for source in filter(None, sources):
        read = source.resolve()
        if place == read or place in read.parents or read in place.parents:
            raise InputError(f"--out: expected a place apart from {source}, which is read, got {out}")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A path beside `out` that takes its name, and its place, when all went well; else nothing remains."""
    with files.disk_errors(out):
        staged, old = (out.parent / f".tmp-{os.getpid()}-{part}{out.name}" for part in ("", "old-"))
        _remove(staged)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staged
            if out.exists():
                out.rename(old)
            staged.rename(out)
        finally:
            _remove(staged)
            if old.exists() and not out.exists():  # the last step failed
                old.rename(out)
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
