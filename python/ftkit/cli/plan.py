"""Says what a run will need before it starts: memory by category, time, and settings that fit."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftkit.cli import print_json
from ftkit.cli._run_options import with_run_options

if TYPE_CHECKING:
    from ftkit.train.planned import Plan


@with_run_options
def command(
    config_path: Path | None,
    overrides: dict[str, Any],
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory that the run may take, such as 8GiB. [default: free now]")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, or a GPU that need not be here, such as cuda:24GiB.")
    ] = "cpu",
    model_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A config.json, for a model that is not here.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Says what a run will need before it starts: memory by category, time, and settings that fit.

    It runs the real code on tensors without memory behind them; nothing is loaded, and nothing is written. The figures
    are those of the largest batch that the configuration allows.

    Examples:

      ftkit plan --model model.gguf --data chats.jsonl --max-tokens 2048

      ftkit plan run.toml --budget 8GiB

      ftkit plan --model-config config.json --device cuda:24GiB --quant nf4 --set model.dtype=bfloat16
    """
    from rich.console import Console

    from ftkit import models
    from ftkit.config import RunConfig
    from ftkit.plan.budget import available_bytes, parse_bytes, parse_device
    from ftkit.train import planned

    architecture = None
    if model_config is not None:
        architecture = models.config_of_file(model_config)
        overrides = {"model.source": str(model_config), "data.path": "-"} | overrides
    config = RunConfig.from_toml(config_path, overrides)
    gpu = parse_device(device)
    room = gpu.bytes if gpu is not None else available_bytes()
    room = parse_bytes(budget) if budget else room
    with Console(stderr=True, quiet=json).status("tracing a step"):
        options = planned.options(config, gpu, architecture)
    chosen = next((option for option in options if option.plan.needed_bytes <= room), options[0])
    fits = chosen.plan.needed_bytes <= room
    if json:
        print_json(
            {
                "peak_bytes": chosen.plan.peak_bytes,
                "peak_rss_bytes": chosen.plan.peak_rss_bytes if gpu is None else None,
                "reserved_bytes": chosen.plan.reserved_bytes,
                "fits": fits,
                "budget_bytes": room,
                "by_category": chosen.plan.by_category,
                "settings": chosen.settings,
                "seconds_per_step": chosen.plan.seconds_per_step,
                "options": [dataclasses.asdict(option.plan) | {"settings": option.settings} for option in options],
            }
        )
        return
    print_plan(chosen.plan)
    _print_options(options, chosen, room)


def print_plan(plan: "Plan") -> None:
    """The plan as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column()
    for name, size in sorted(plan.by_category.items(), key=lambda item: -item[1]):
        table.add_row(_size(size), name)
    table.add_row(_size(plan.peak_bytes), "tensors at the peak of a step", style="bold")
    if plan.reserved_bytes is None:
        table.add_row(_size(plan.peak_rss_bytes), "the process, from above")
        table.add_row(_time(plan), "a step of full rows, about")
    else:
        table.add_row(_size(plan.reserved_bytes), "reserved for them by torch's allocator")
        table.add_row(_size(plan.needed_bytes), "of the GPU, with the process' own share")
    Console().print(table)


def _print_options(options: Any, chosen: Any, room: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"settings, for {_size(room)}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    what = "process" if chosen.plan.reserved_bytes is None else "GPU"
    for name, justify in (("", "left"), (what, "right"), ("a step", "right"), ("settings", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for option in options:
        fits = option.plan.needed_bytes <= room
        mark = "→" if option is chosen and fits else ""
        words = ", ".join(f"{key} = {value}" for key, value in option.settings.items()) or "as given"
        style = "" if fits else "dim"
        size, time = _size(option.plan.needed_bytes), _time(option.plan)
        table.add_row(mark, size, time, words if fits else f"{words} (does not fit)", style=style)
    Console().print(table)


def _time(plan: "Plan") -> str:
    return "" if plan.seconds_per_step is None else f"{plan.seconds_per_step:.1f} s"


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
