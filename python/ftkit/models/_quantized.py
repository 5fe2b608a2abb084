"""Matrices that are converted to a quantization scheme while a model loads, one after the other.

What was converted is kept on disk, a file a matrix, under the hash of the model's weights and the scheme: the next load
reads it. A file appears whole or not at all; one that is damaged is made anew.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftkit import plugins
from ftkit.config.cache import cache_directory
from ftkit.errors import InputError
from ftkit.nn.linear import Weight

STAY_DENSE = ("model.embed_tokens.weight", "lm_head.weight")
"""Matrices that stay dense: a look-up needs single rows, and the head's errors are the answer's."""


def scheme_of(quant: str) -> Any | None:
    """The scheme called `quant`; None for one whose blocks are the file's own, which converts nothing.

    Raises InputError for a name or an option that is not there.
    """
    name, colon, option = quant.partition(":")
    module = plugins.load("quant", name)
    make = getattr(module, "scheme", None)
    options = getattr(module, "OPTIONS", ("",))
    if option not in options or (colon and not option):
        known = ", ".join(f"{name}:{allowed}" if allowed else name for allowed in options)
        raise InputError(f"quant: expected one of {known}, got {quant!r}")
    return None if make is None else make(option)


class Converted:
    """The converted matrices of one model."""

    def __init__(self, scheme: Any, fingerprint: str, path: Path, dtype: torch.dtype) -> None:
        """`fingerprint`: of the weights in `path`; `dtype`: what the model computes in."""
        self._scheme, self._dtype = scheme, dtype
        # the fingerprint samples tensors; size and time of the files tell apart what differs between the samples
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(f"{fingerprint} {scheme.name} {scheme.version} {stats}".encode()).hexdigest()[:32]
        self._folder = cache_directory() / "quantized" / f"{scheme.name.replace(':', '-')}-{key}"

    def weight(self, name: str, shape: tuple[int, int], read: Callable[[], Tensor]) -> Weight:
        """The weight `name`; `read` gives its values where they aren't kept yet."""
        layout = self._scheme.layout(shape)
        path = self._folder / f"{name}.safetensors"
        parts = _kept(path, layout)
        if parts is None:
            try:
                parts = self._scheme.encode(read())
            except InputError as error:
                message = error.message if error.message.startswith(name) else f"{name}: {error.message}"
                raise InputError(message, error.hint) from None
            _keep(path, parts)
        weight: Weight = self._scheme.hold(parts, shape, self._dtype)
        return weight


def _kept(path: Path, layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor] | None:
    """The parts in the file; None where it isn't there, or isn't what it should be."""
    try:
        parts = load_file(path)
    except (OSError, SafetensorError):
        return None
    found = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    return parts if found == layout else None


def _keep(path: Path, parts: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(parts, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: expected to keep the converted weights there, got: {str(error).lower()}",
            "FTKIT_CACHE names another directory",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
