"""An adapter's content on disk: read from a directory that requests may name, kept by its hash."""

import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ftkit.adapters import _files as adapter_files
from ftkit.errors import InputError
from ftkit.serve.refused import Refused

# Nothing else of a directory is looked at: no code, no pickles.
_NAMES = (adapter_files.CONFIG, adapter_files.WEIGHTS, adapter_files.RECORD)
_MOST_BYTES = {adapter_files.CONFIG: 1 << 20, adapter_files.WEIGHTS: 16 << 30, adapter_files.RECORD: 1 << 20}
_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Content:
    """What an adapter is."""

    hash: str
    """SHA-256 of its files: names, sizes, bytes."""
    bytes: int
    method: str


def inside(root: Path, given: str) -> Path:
    """The adapter's directory of this path below `root`; a run's directory stands for its adapter.

    Raises Refused for what leads elsewhere: absolute paths, `..`, hidden names, links out of `root`.
    """
    pure = PurePosixPath(given)
    plain = given and "\0" not in given and "\\" not in given and not pure.is_absolute() and len(given) <= 1000
    if not plain or any(part.startswith(".") for part in pure.parts) or not pure.parts:
        raise _outside(given)
    try:
        found, home = (root / pure).resolve(strict=True), root.resolve(strict=True)
        if (found / "config.toml").is_file() and (found / "adapter").is_dir():
            found = (found / "adapter").resolve(strict=True)
    except (OSError, RuntimeError):
        raise _outside(given) from None
    if not found.is_relative_to(home) or found == home or not found.is_dir():
        raise _outside(given)
    return found


def of(place: Path) -> Content:
    """The content of a directory. Raises InputError when it is no adapter's."""
    return _read(place, None)


def keep(place: Path, room: Path) -> Content:
    """Copies a directory's content to `room`, under its hash. Raises InputError when it is none, or too large."""
    temporary = room / f".tmp-{os.getpid()}-{os.urandom(8).hex()}"
    temporary.mkdir()
    try:
        content = _read(place, temporary)
        home = room / content.hash
        try:
            temporary.rename(home)
        except OSError:
            if not home.is_dir():  # else somebody has kept the same before
                raise
        return content
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(room: Path, wanted: set[str]) -> None:
    """Removes what is kept and not wanted."""
    for path in room.iterdir() if room.is_dir() else ():
        if len(path.name) == 64 and path.name not in wanted:
            shutil.rmtree(path, ignore_errors=True)


def lineage(place: Path) -> dict[str, Any]:
    """Where an adapter comes from, as far as its directory tells: run, data, base. Empty for one without a record."""
    record = _object(place / adapter_files.RECORD)
    found = {"base": record.get("base_fingerprint"), "base_name": record.get("base")}
    run = place.parent
    if place.name == "adapter" and (run / "config.toml").is_file():
        inputs = _object(run / "lock.json").get("inputs")
        result = _object(run / "result.json")
        found |= {"run": run.name, "data": inputs.get("data") if isinstance(inputs, dict) else None}
        found["steps"] = result.get("steps")
    return {key: value for key, value in found.items() if isinstance(value, str | int) and value != ""}


def _read(place: Path, to: Path | None) -> Content:
    """Hashes the files of a directory, and copies them. Links are not followed: a link may change where it leads."""
    digest, total = hashlib.sha256(), 0
    for name in _NAMES:
        try:
            descriptor = os.open(place / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"{name}: expected a plain file, got: {os.strerror(error.errno or 0).lower()}") from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{name}: expected a plain file, got another")
            if status.st_size > _MOST_BYTES[name]:
                raise InputError(f"{name}: expected at most {_MOST_BYTES[name]} bytes, got {status.st_size}")
            digest.update(f"{name} {status.st_size}\n".encode())
            total += _copy(file, digest, None if to is None else to / name)
    if not (place if to is None else to).joinpath(adapter_files.WEIGHTS).is_file():
        raise InputError(f"expected an adapter's directory with {adapter_files.WEIGHTS}, got none there")
    folder = place if to is None else to
    method = _object(folder / adapter_files.RECORD).get("method")
    kind = _object(folder / adapter_files.CONFIG).get("peft_type")
    return Content(hash=digest.hexdigest(), bytes=total, method=str(method or kind or "unknown").lower())


def _copy(file: Any, digest: Any, to: Path | None) -> int:
    count = 0
    out = None if to is None else to.open("xb")
    try:
        while piece := file.read(_PIECE):
            digest.update(piece)
            count += len(piece)
            if out is not None:
                out.write(piece)
        if out is not None:
            out.flush()
            os.fsync(out.fileno())
    finally:
        if out is not None:
            out.close()
    return count


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is none. What is wrong with it, loading tells."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _outside(given: str) -> Refused:
    message = f"path: expected an adapter's directory below the directory of adapters, got {given[:200]!r}"
    return Refused(message, param="path", code="invalid_value")
