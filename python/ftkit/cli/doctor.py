"""Say what this machine is, and what ftkit uses of it: one thing to paste into a bug report."""

from typing import Annotated

import typer

from ftkit.cli import print_json


def command(
    gpu: Annotated[bool, typer.Option("--gpu", help="Run every kernel on the GPU: is it right, and how fast?")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Say what this machine is, and what ftkit uses of it: one thing to paste into a bug report.

    Example: ftkit doctor
    """
    if gpu:
        _try_kernels(json)
        return
    from ftkit.data import cache_directory
    from ftkit.plan import machine

    facts = machine.report(cache_directory())
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name.removesuffix('_bytes').replace('_', ' '):<17} {_shown(name, value)}")


def _try_kernels(json: bool) -> None:
    from ftkit.errors import GateError
    from ftkit.kernels import _gpu_trial

    found = _gpu_trial.report()
    if json:
        print_json({"kernels": found})
    else:
        for one in found:
            print(
                f"{one['kernel']:<17} {'right' if one['passed'] else 'WRONG'}  {one['microseconds']:9.1f} µs  "
                f"torch {one['torch_microseconds']:9.1f} µs  {one['gigabytes_per_second']:7.1f} GB/s"
            )
    if wrong := [one["kernel"] for one in found if not one["passed"]]:
        raise GateError(f"doctor --gpu: expected torch's answers, got others from {', '.join(wrong)}")


def _shown(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
