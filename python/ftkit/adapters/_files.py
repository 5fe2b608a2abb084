"""An adapter on disk: PEFT's two files, and ftkit.json with what PEFT has no place for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ftkit.errors import InputError
from ftkit.nn.shards import Whole
from ftkit.nn.shards import write as write_tensors

PREFIX = "base_model.model."
"""Before a layer's name in the keys of PEFT's files."""
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "ftkit.json"


@dataclass(frozen=True, kw_only=True)
class Files:
    """The content of an adapter's directory."""

    config: dict[str, Any]
    """adapter_config.json; empty for a method that PEFT does not have."""
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    """ftkit.json; empty for an adapter from PEFT."""


def write(
    folder: Path | None,
    tensors: Mapping[str, Tensor],
    peft_type: str | None,
    options: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Writes a new directory; without one it takes part in gathering tensors that processes share out."""
    stored = {key: Whole.of(tensor.detach()) for key, tensor in tensors.items()}
    if folder is None:
        write_tensors(None, stored)
        return
    folder.mkdir(parents=True)
    write_tensors(folder / WEIGHTS, stored, {"format": "pt"})
    if peft_type is not None:
        config = {
            "peft_type": peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": record["base"] or None,
            "inference_mode": True,
            **options,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Files:
    """Reads a directory. Raises InputError when it is not an adapter's."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected an adapter's directory, got {'a file' if folder.exists() else 'nothing'}")
    record, config = _object(folder / RECORD), _object(folder / CONFIG)
    if not record and not config:
        raise InputError(f"{folder}: expected {CONFIG} or {RECORD}, got neither")
    if not (folder / WEIGHTS).is_file():
        hint = "pickled weights (.bin) can run code when read" if (folder / "adapter_model.bin").exists() else None
        raise InputError(f"{folder}: expected {WEIGHTS}, got nothing", hint)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: expected a safetensors file, got: {str(error).lower()}") from None
    return Files(config=config, tensors=tensors, record=record)


@dataclass(frozen=True)
class Snapshot:
    """The bytes of a directory's files, all as they were at one moment; empty for one that is not there."""

    weights: bytes
    config: bytes
    record: bytes

    @property
    def content(self) -> str:
        """Their hash."""
        parts = (hashlib.sha256(part).digest() for part in (self.weights, self.config, self.record))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def head(self) -> bytes:
        """The beginning of the weights, which says what is where in them."""
        return self.weights[: 8 + int.from_bytes(self.weights[:8], "little")]


def snapshot(folder: Path) -> Snapshot:
    """Reads a directory's files. Raises InputError when one cannot be read, or they change meanwhile."""
    paths = [folder / name for name in (WEIGHTS, CONFIG, RECORD)]

    def states() -> list[tuple[int, ...] | None]:
        found = [path.stat() if path.exists() else None for path in paths]
        return [state and (state.st_ino, state.st_size, state.st_mtime_ns) for state in found]

    try:
        before = states()
        parts = [path.read_bytes() if state else b"" for path, state in zip(paths, before, strict=True)]
        after = states()
    except OSError as error:
        text = str(error).lower()
        raise InputError(f"{error.filename or folder}: expected a file that can be read, got: {text}") from None
    if before != after:
        raise InputError(f"{folder}: expected files that stay as they are while they are read, got others")
    return Snapshot(*parts)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file."""
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object, got: {str(error).lower()}") from None
    if not isinstance(table, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(table).__name__}")
    return table
