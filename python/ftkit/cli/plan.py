"""Says what a run will need before it starts: memory by category, time, and what fits."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftkit.cli import print_json
from ftkit.cli._run_options import with_run_options
from ftkit.errors import GateError, InputError

if TYPE_CHECKING:
    from ftkit.config import RunConfig
    from ftkit.train.fitting import Other
    from ftkit.train.planned import Plan


@with_run_options
def command(
    config_path: Path | None,
    overrides: dict[str, Any],
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, or a GPU that need not be here, such as cuda:24GiB.")
    ] = "cpu",
    model_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A config.json, for a model that is not here.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run two steps for real, and hold them against the plan.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Says what a run will need before it starts: memory by category, time, and what fits.

    It runs the real code on tensors without memory behind them; nothing is loaded, and nothing is written. The figures
    are those of the largest batch that the configuration allows. docs/memory.md has what they assume; --verify measures
    it on this machine (exit code 3 where a plan was too low).

    Examples:

      ftkit plan --model model.gguf --data chats.jsonl --max-tokens 2048

      ftkit plan run.toml --budget 8GiB

      ftkit plan run.toml --verify

      torchrun --nproc-per-node 2 -m ftkit plan run.toml

      ftkit plan --model-config config.json --device cuda:24GiB --quant nf4 --set model.dtype=bfloat16
    """
    from rich.console import Console

    from ftkit import models
    from ftkit.config import RunConfig
    from ftkit.plan.budget import available_bytes, parse_bytes, parse_device, written
    from ftkit.plan.speed import advice, speeds
    from ftkit.train import fitting
    from ftkit.train.planned import Case
    from ftkit.train.processes import launched

    architecture = None
    if model_config is not None:
        architecture = models.config_of_file(model_config)
        overrides = {"model.source": str(model_config), "data.path": "-"} | overrides
    config = RunConfig.from_toml(config_path, overrides)
    if verify:
        if launched() > 1:
            raise InputError("verify: expected one process, got several", "without torchrun it verifies one of them")
        if model_config is not None or device != "cpu":
            raise InputError(
                "verify: expected a model and a machine that are here, got --model-config or --device",
                "model.device says where it runs; auto takes a GPU where there is one",
            )
        _verify(config, json)
        return
    gpu = parse_device(device)
    room = gpu.bytes if gpu is not None else available_bytes()
    room = parse_bytes(config.training.budget) if config.training.budget else room
    if gpu is None:
        room //= launched()  # they share the machine's memory
    with Console(stderr=True, quiet=json).status("tracing steps"):
        case = Case.of_configuration(config, gpu, architecture)
        tried = fitting.fit(case, room)
        plan, fits = tried[-1], tried[-1].needed_bytes <= room
        sparse = case.with_few_trained().plan(plan.way) if config.training.sparse_tokens < 1 else None
        others = (
            [] if fits else fitting.others(config, room, lambda other: Case.of_configuration(other, gpu, architecture))
        )
    precise = gpu is not None or config.training.precision != "dtype"
    told = None if precise else advice(speeds(), config.model.dtype)
    if os.environ.get("RANK", "0") != "0":
        return  # one speaks for all
    if json:
        print_json(
            {
                "processes": launched(),
                "peak_bytes": plan.peak_bytes,
                "peak_rss_bytes": plan.peak_rss_bytes if gpu is None else None,
                "reserved_bytes": plan.reserved_bytes,
                "fits": fits,
                "budget_bytes": room,
                "by_category": plan.by_category,
                "way": dataclasses.asdict(plan.way),
                "seconds_per_step": plan.seconds_per_step,
                "tried": [dataclasses.asdict(plan) for plan in tried],
                "others": [dataclasses.asdict(other) for other in others],
                "precision": told,
                **({} if sparse is None else {"sparse_peak_bytes": sparse.peak_bytes}),
            }
        )
        return
    if launched() > 1:
        print(f"each of {launched()} processes:")
    print_plan(plan)
    _print_tried(tried, others, room)
    if sparse is not None:
        print(
            f"\nsparse tokens: what is left out depends on the data, which train will have read; nothing is, above.\n"
            f"{written(sparse.peak_bytes)} of tensors where the trained tokens of a row fit into the share"
        )
    if told is not None:
        print(f"\n{told}")


def _verify(config: "RunConfig", json: bool) -> None:
    """Prints what was planned beside what was measured. Raises GateError where a plan was too low."""
    from rich.console import Console
    from rich.table import Table

    from ftkit.plan.budget import written
    from ftkit.train.verified import verify

    with Console(stderr=True, quiet=json).status("running two steps of the largest batch"):
        plan, checks = verify(config)
    if json:
        print_json({"way": dataclasses.asdict(plan.way), "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("", "planned", "measured", "of the plan"):
            table.add_column(name, justify="right" if name else "left")
        for check in checks:
            of = written if check.unit == "bytes" else "{:.2f} s".format
            table.add_row(check.name, of(check.planned), of(check.measured), f"{check.measured / check.planned:.3f}")
        Console().print(table)
    low = [check.name for check in checks if not check.holds]
    if low:
        raise GateError(
            f"expected no more than planned, got more: {', '.join(low)}",
            "docs/memory.md says what is assumed; please report the table with ftkit doctor's output",
        )


def print_plan(plan: "Plan") -> None:
    """The plan as a table on standard output, with a bar for each category's share of the peak."""
    from rich.console import Console

    from ftkit.cli._bars import bars
    from ftkit.plan.budget import written

    table = bars(plan.by_category, plan.peak_bytes)
    table.add_row(written(plan.peak_bytes), "tensors at the peak of a step", style="bold")
    if plan.reserved_bytes is None:
        table.add_row(written(plan.peak_rss_bytes), "the process, from above")
        table.add_row(_time(plan), "a step of full rows, about")
    else:
        table.add_row(written(plan.reserved_bytes), "reserved for them by torch's allocator")
        table.add_row(written(plan.needed_bytes), "of the GPU, with the process' own share")
    Console().print(table)


def _print_tried(tried: "list[Plan]", others: "list[Other]", room: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from ftkit.plan.budget import written
    from ftkit.train.fitting import described, written_settings

    table = Table(box=None, padding=(0, 2, 0, 0))
    what = "process" if tried[-1].reserved_bytes is None else "GPU"
    for name, justify in (("", "left"), (what, "right"), ("a step", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for plan in tried:
        fits = plan.needed_bytes <= room
        words = described(plan.way) if fits else f"{described(plan.way)} (does not fit)"
        table.add_row("→" if fits else "", written(plan.needed_bytes), _time(plan), words, style="" if fits else "dim")
    for other in others:
        words = f"with {written_settings(other.settings)}: another update"
        table.add_row("", written(other.plan.needed_bytes), _time(other.plan), words)
    console = Console()
    console.print(f"\nways to the same update, for {written(room)}")
    console.print(table)


def _time(plan: "Plan") -> str:
    return "" if plan.seconds_per_step is None else f"{plan.seconds_per_step:.1f} s"
