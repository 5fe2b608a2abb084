"""List what there is to choose from: methods, objectives, models, targets and so on."""

from typing import Annotated

import typer

from ftkit.cli import print_json

# What people call a room → the package that its plugins are files of.
ROOMS = {
    "methods": "adapters",
    "objectives": "objectives",
    "models": "models",
    "optimizers": "optim",
    "schedules": "optim.schedules",
    "kernels": "kernels",
    "targets": "export",
    "merges": "merge",
    "onto": "merge.onto",
    "decoding": "engine.decode",
    "indices": "engine.indices",
    "suites": "eval",
    "recipes": "recipes",
    "loggers": "train.loggers",
    "commands": "cli",
}


def command(
    room: Annotated[
        str | None, typer.Argument(help="One of " + ", ".join([*ROOMS, "quant"]), show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """List what there is to choose from: methods, objectives, models, targets and so on.

    Examples:

      ftkit list

      ftkit list methods
    """
    from rich.console import Console
    from rich.table import Table

    found = {room: entries(room)} if room else {name: entries(name) for name in [*ROOMS, "quant"]}
    if json:
        print_json(found)
        return
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, lines in found.items():
        if room:
            for entry, text in lines.items():
                table.add_row(entry, text)
        else:
            table.add_row(name, ", ".join(lines))
    Console().print(table)


def entries(room: str) -> dict[str, str]:
    """Name → description of a room's plugins. Raises InputError for a room that isn't there."""
    from ftkit import _core, plugins
    from ftkit.errors import InputError, did_you_mean

    if room == "quant":
        schemes = {name: plugins.describe("quant", name) for name in plugins.names("quant")}
        formats = sorted(_core.quant_formats())
        return schemes | {name: f"GGUF blocks, {8 * size / values:.4g} bits a weight" for name, values, size in formats}
    if room not in ROOMS:
        known = [*ROOMS, "quant"]
        raise InputError(f"list: expected one of {', '.join(known)}, got {room!r}", did_you_mean(room, known))
    return {name: plugins.describe(ROOMS[room], name) for name in plugins.names(ROOMS[room])}
