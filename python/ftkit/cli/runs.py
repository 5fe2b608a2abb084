"""Look at the runs there are: list, show, compare, prune."""

from typing import Annotated, Any

import typer

from ftkit.cli import print_json

command = typer.Typer(help="Look at the runs there are.", no_args_is_help=True)

RunsDir = Annotated[str, typer.Option("--runs-dir", help="The directory of runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@command.command("list")
def list_runs(runs_dir: RunsDir = "runs", json: Json = False) -> None:
    """All runs, the oldest first.

    Example:  ftkit runs list
    """
    from ftkit.train import directory, history

    runs = [history.summary(run) for run in directory.every(runs_dir)]
    if json:
        print_json({"runs": runs})
        return
    rows = [
        [
            run["run"],
            history.age(run["started"]),
            run["state"],
            f"{run['steps']}/{run['of_steps'] or '?'}",
            _number(run["loss"]),
            _number(run["eval_loss"]),
            _size(run["bytes"]),
        ]
        for run in runs
    ]
    _table(["run", "started", "state", "steps", "loss", "held out", "size"], rows, empty=f"no runs in {runs_dir}")


@command.command("show")
def show(name: str, runs_dir: RunsDir = "runs", json: Json = False) -> None:
    """One run: how it went, what it was told, what it warned of.

    Example:  ftkit runs show second-try
    """
    from ftkit.config import toml
    from ftkit.train import directory, events, history

    run = directory.existing(runs_dir, name)
    config, _ = toml.read_file(run.config)
    found = history.summary(run)
    warnings = [event for event in events.read(run.events) if event["event"] in ("warning", "notice")]
    if json:
        print_json({**found, "config": config, "result": run.finished(), "warnings": warnings})
        return
    shown = {**found, "started": history.age(found["started"]), "bytes": _size(found["bytes"])}
    _table(
        ["", run.name], [[key, "–" if value is None else str(value)] for key, value in shown.items() if key != "run"]
    )
    for event in warnings:
        print(f"{event['event']}: {event['message']}")
    print(f"\n{run.config.read_text(encoding='utf-8')}\nreport: {run.report}")


@command.command("compare")
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN…")], runs_dir: RunsDir = "runs", json: Json = False
) -> None:
    """Runs side by side: what differs in their settings, and what came of it.

    Example:  ftkit runs compare first second
    """
    from ftkit.train import directory, history

    runs = [directory.existing(runs_dir, name) for name in names]
    summaries = [history.summary(run) for run in runs]
    different = history.settings_that_differ(runs)
    if json:
        print_json({"runs": summaries, "settings": different})
        return
    rows = [[key, *(_number(run[key]) for run in summaries)] for key in ("loss", "eval_loss")]
    rows += [[key, *(str(run[key]) for run in summaries)] for key in ("state", "steps")]
    rows += [[key, *("–" if value is None else str(value) for value in values)] for key, values in different.items()]
    _table(["", *names], rows)


@command.command("prune")
def prune(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RUN…]", help="All runs when none is named.")] = None,
    keep: Annotated[int, typer.Option("--keep", help="Newest checkpoints of each run that stay.")] = 0,
    runs_dir: RunsDir = "runs",
    json: Json = False,
) -> None:
    """Remove checkpoints of finished runs; adapters, events and reports stay, and so do runs that can be continued.

    Example:  ftkit runs prune --keep 1
    """
    from ftkit.train import directory, history

    runs = [directory.existing(runs_dir, name) for name in names] if names else directory.every(runs_dir)
    removed, freed = history.prune(runs, keep)
    if json:
        print_json({"removed": [str(path) for path in removed], "bytes": freed})
    else:
        print(f"removed {len(removed)} checkpoints, {_size(freed)}")


def _table(head: list[str], rows: list[list[str]], empty: str = "") -> None:
    """Rows as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print(empty)
        return
    table = Table(box=None, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4f}"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
