"""lock.json: what a run was made of, so that it can be repeated, and so that a resume on something else is noticed.

Inputs (base weights, tokenizer, template, data) must be the same for a run to continue. The surroundings (versions,
machine, threads) may differ, but then the bits of the result may too, and that is said.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import ftkit
from ftkit.errors import InputError
from ftkit.plan.speed import processor
from ftkit.train import files

Lock = dict[str, dict[str, Any]]


def surroundings(device: str) -> dict[str, Any]:
    """What decides the order of additions: versions, machine, threads, device."""
    return {
        "ftkit": ftkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()} {processor()[0]}".strip(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "kernels": os.environ.get("FTKIT_KERNELS", ""),
    }


def write(path: Path, lock: Lock) -> None:
    """Writes `{"inputs": …, "surroundings": …}`."""
    files.write_text(path, json.dumps(lock, indent=2, ensure_ascii=False) + "\n")


def read(path: Path) -> Lock:
    """Reads a lock back. Raises InputError when it is damaged."""
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        return {"inputs": dict(lock["inputs"]), "surroundings": dict(lock["surroundings"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the lock of a run, got: {str(error).lower()}") from None


def differences(before: Lock, now: Lock) -> tuple[list[str], list[str]]:
    """(inputs that differ, surroundings that differ), each as `name: was …, is …`."""

    def compare(part: str) -> list[str]:
        names = sorted({*before[part], *now[part]})
        pairs = [(name, before[part].get(name), now[part].get(name)) for name in names]
        return [f"{name}: was {_short(was)}, is {_short(now_is)}" for name, was, now_is in pairs if was != now_is]

    return compare("inputs"), compare("surroundings")


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
