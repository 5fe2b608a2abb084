"""Say what this machine is, and what ftkit uses of it: one thing to paste into a bug report."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from ftkit.cli import print_json


def command(
    gpu: Annotated[bool, typer.Option("--gpu", help="Run every kernel on the GPU: is it right, and how fast?")] = False,
    out: Annotated[Path | None, typer.Option(help="With --gpu: a folder for the report, gpu.json and gpu.txt.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Say what this machine is, and what ftkit uses of it: one thing to paste into a bug report.

    Example: ftkit doctor
    """
    if gpu:
        _try_kernels(json, out)
        return
    from ftkit.data import cache_directory
    from ftkit.plan import machine

    facts = machine.report(cache_directory())
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name.removesuffix('_bytes').replace('_', ' '):<17} {_shown(name, value)}")


def _try_kernels(json: bool, out: Path | None) -> None:
    from ftkit.errors import GateError
    from ftkit.kernels import _gpu_trial

    found = _gpu_trial.report()
    text = _gpu_trial.readable(found)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(dumps(found, indent=2) + "\n", encoding="utf-8")
        (out / "gpu.txt").write_text(text + "\n", encoding="utf-8")
    if json:
        print_json(found)
    else:
        print(text)
    if wrong := [one["kernel"] for one in found["kernels"] if not one["passed"]]:
        raise GateError(f"doctor --gpu: expected torch's answers, got others from {', '.join(wrong)}")


def _shown(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
