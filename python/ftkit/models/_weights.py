"""Weights on disk, by name: a directory of safetensors, or a GGUF file. Both are memory-mapped and checked."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from ftkit import _core
from ftkit.errors import InputError

FLOATS = ("F16", "BF16", "F32", "F64")
"""The dtypes of dense weights, as safetensors calls them."""
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_SUMMED = 1 << 18
"""Values that are looked at together."""


class Weights(Protocol):
    """Named tensors in a file or in several."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype` on the CPU. Raises InputError when values are NaN or infinite."""

    def read_mapped(self, name: str) -> Tensor:
        """The tensor as it is stored where torch has its type, without a copy; else in float32. Raises as `read`."""

    def fingerprint(self) -> str:
        """A hash of the tensors' names, shapes, formats, and of bytes at 16 places of each.

        Any finetuning changes it; it does not read files of many gigabytes whole.
        """


class Safetensors:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names."""

    def __init__(self, folder: Path, *, floats: bool = True) -> None:
        """`floats`: raises InputError for a tensor of another dtype than those of `FLOATS`."""
        self._files = [(path, _open(path)) for path in _shards(folder)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._home: dict[str, Any] = {}
        problems = []
        for path, file in self._files:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                self.dtypes[name] = part.get_dtype()
                if floats and self.dtypes[name] not in FLOATS:
                    problems.append(f"{name}: expected one of {', '.join(FLOATS)}, got {self.dtypes[name]}")
                if name in self._home:
                    problems.append(f"{name}: expected in one file, got it again in {path.name}")
                self.shapes[name], self._home[name] = tuple(part.get_shape()), file
        _raise(str(folder), problems)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor; without a copy where it is stored in `dtype`."""
        return self.read_mapped(name).to(dtype)

    def read_mapped(self, name: str) -> Tensor:
        """The tensor, mapped from its file."""
        tensor = self.stored(name)
        # a sum is one pass; only where it is not finite (or overflows) each value is looked at. torch converts what it
        # sums in another type, so it gets a part at a time
        sums = [part.sum(dtype=torch.float32) for part in tensor.flatten().split(_SUMMED)]
        if not torch.isfinite(torch.stack(sums)).all() and not torch.isfinite(tensor).all():
            raise InputError(f"{name}: expected finite weights, got {_wrong(tensor)}")
        return tensor

    def stored(self, name: str) -> Tensor:
        """The tensor as it is in the file, of whatever dtype."""
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        """See `Weights`."""
        return _digest((name, self.stored(name)) for name in sorted(self.shapes))


class Gguf:
    """A GGUF file."""

    def __init__(self, path: Path) -> None:
        self.file = _core.GgufFile(path)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape, _ in self.file.tensors}
        self._path = path

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor, dequantized."""
        direct = dtype in (torch.float32, torch.bfloat16, torch.float16)
        out = torch.empty(self.shapes[name], dtype=dtype if direct else torch.float32)
        self.file.read(name, out)
        return out.to(dtype)

    def read_mapped(self, name: str) -> Tensor:
        """The tensor, dequantized: torch has no type for blocks."""
        return self.read(name, torch.float32)

    @property
    def formats(self) -> dict[str, str]:
        """Name → block format of the matrices."""
        return {name: kind for name, shape, kind in self.file.tensors if len(shape) == 2}

    def blocks(self, name: str) -> Tensor:
        """A matrix' blocks, uint8 [rows, bytes of a row], mapped from the file; to be read, not written.

        Raises InputError when a value is NaN or infinite.
        """
        self.file.check(name)
        start, size = self.file.place(name)
        return self._map[start : start + size].view(self.shapes[name][0], -1)

    @functools.cached_property
    def _map(self) -> Tensor:
        """The whole file; private, so that nothing can be written to it."""
        return torch.from_file(str(self._path), shared=False, size=self._path.stat().st_size, dtype=torch.uint8)

    def fingerprint(self) -> str:
        """See `Weights`."""
        kinds = {name: kind for name, _, kind in self.file.tensors}

        def blocks() -> Iterator[tuple[str, Tensor]]:
            for name in sorted(kinds):
                start, size = self.file.place(name)
                yield f"{name} {kinds[name]}", self._map[start : start + size]

        return _digest(blocks())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when it isn't one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file, got nothing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object, got: {str(error).lower()}") from None
    if not isinstance(table, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(table).__name__}")
    return table


def _shards(folder: Path) -> list[Path]:
    """The files of a model's directory, in order."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise InputError(f"{index}: expected a table 'weight_map' of file names, got {names!r:.80}")
        paths = [folder / name for name in sorted(set(names.values()))]
        outside = [path for path in paths if path.parent != folder]
        missing = [path for path in paths if not path.is_file()]
        _raise(str(index), [f"expected a file in the same directory, got {path}" for path in outside])
        _raise(str(index), [f"expected the file {path.name}, got nothing" for path in missing])
        return paths
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    hint = None
    if any(folder.glob("pytorch_model*.bin")):
        hint = "pickled weights (.bin) can run code when read; convert them to safetensors first"
    raise InputError(f"{folder}: expected model.safetensors or model.safetensors.index.json, got neither", hint)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected a safetensors file, got: {str(error).lower()}") from None


def _raise(where: str, problems: list[str]) -> None:
    if problems:
        raise InputError(f"{where}: " + (problems[0] if len(problems) == 1 else "\n  ".join(["", *problems]).strip()))


def _wrong(tensor: Tensor) -> str:
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{nan} NaN and {infinite} infinite of {tensor.numel()}"


def _digest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """sha256 of names, dtypes, shapes and sampled bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.contiguous().flatten().view(torch.uint8)
        if len(data) <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(data.numpy().tobytes())
            continue
        step = (len(data) - _SAMPLE_BYTES) // (_SAMPLES - 1)
        for start in range(0, _SAMPLES * step, step):
            digest.update(data[start : start + _SAMPLE_BYTES].numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
