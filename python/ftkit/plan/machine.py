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
from ftkit.plan.speed import advice, processor, speeds

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
    model, flags = processor()
    features = [name for name in _FEATURES if name in flags]
    found = speeds(anew=True)
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
        "gflops": {
            name: round(getattr(found, name) / 1e9, 1) for name in ("float32", "bfloat16", "blocks", "attention")
        },
        "precision": advice(found, "float32") or "float32",
        "memory_gigabytes_per_second": round(found.bandwidth / 1e9, 1),
    }


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
