"""What this machine is and has: the facts that a bug report needs, and no more."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from ftkit import _core
from ftkit.errors import InputError
from ftkit.plan.budget import available_bytes
from ftkit.plan.speed import matmul_flops_per_second

_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)
_PACKAGES = ("torch", "numpy", "safetensors", "huggingface-hub", "llama-cpp-python", "tensorboard", "wandb", "trackio")


def report(cache: Path) -> dict[str, Any]:
    """The machine, the versions, and how fast it multiplies matrices now."""
    model, features = _processor()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    place = next(folder for folder in [cache, *cache.parents] if folder.exists())
    return {
        "ftkit": _core.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": model,
        "features": features,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_available_bytes": _available(),
        "gpus": gpus,
        "cache": str(cache),
        "cache_free_bytes": shutil.disk_usage(place).free,
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "kernels": os.environ.get("FTKIT_KERNELS") or "fastest",
        "matmul_gflops": {
            str(dtype).removeprefix("torch."): round(matmul_flops_per_second(dtype) / 1e9, 1)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }


def _processor() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = [line.partition(":") for line in text.split("\n\n")[0].splitlines()]
    values = {name.strip(): value.strip() for name, _, value in fields}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    return values.get("model name", platform.machine()), [name for name in _FEATURES if name in flags]


def _available() -> int | None:
    try:
        return available_bytes()
    except InputError:  # a system that doesn't tell
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
