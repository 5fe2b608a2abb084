"""Say what this machine is, and what ftkit uses of it: one thing to paste into a bug report."""

from typing import Annotated

import typer

from ftkit.cli import print_json


def command(
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Say what this machine is, and what ftkit uses of it: one thing to paste into a bug report.

    Example: ftkit doctor
    """
    from ftkit.data import cache_directory
    from ftkit.plan import machine

    facts = machine.report(cache_directory())
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name.removesuffix('_bytes').replace('_', ' '):<17} {_shown(name, value)}")


def _shown(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
