"""How much memory a run may take: what the user says, or what is free now."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ftkit.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MARGIN = 0.05
"""Share of the free memory that is left to others."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU to plan for, which need not be here."""

    bytes: int
    """What torch may reserve on it."""
    expandable: bool
    """Whether torch's allocator has expandable segments there."""

    @classmethod
    def of(cls, size: int) -> "Gpu":
        """One that has `size` bytes, with torch's allocator as the environment sets it."""
        settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
        return cls(bytes=size, expandable="expandable_segments:true" in settings.lower())


def parse_device(text: str) -> Gpu | None:
    """`cuda:24GiB` as a GPU of that size, `cpu` as None. Raises InputError for anything else."""
    kind, colon, size = text.partition(":")
    if text == "cpu":
        return None
    if kind != "cuda" or not colon:
        raise InputError(f"device: expected cpu, or a GPU with its memory such as cuda:24GiB, got {text!r}")
    return Gpu.of(parse_bytes(size))


def parse_bytes(text: str) -> int:
    """`8GiB`, `500 MB` or `1073741824` in bytes. Raises InputError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise InputError(f"budget: expected a size such as 8GiB or 500MB, got {text!r}")
    return int(float(match[1]) * unit)


def written(size: float) -> str:
    """A number of bytes as people read it, such as 1.50 GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def available_bytes() -> int:
    """Memory that a process may take now: what is free, within the control group's limit, less a margin."""
    free = [_meminfo("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    limit, used = (_number(group / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free.append(max(limit - used, 0))
    return int(min(free) * (1 - _MARGIN))


def _meminfo(key: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise InputError(f"budget: expected to read the free memory, got {error}", "give it as --budget 8GiB") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
