"""Merge adapters into a model, and prove that it answers the same."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftkit.cli import print_json

if TYPE_CHECKING:
    from ftkit.eval.parity import Parity
    from ftkit.export import Measured


def command(
    model: Annotated[
        str, typer.Argument(help="Directory of safetensors, .gguf file, hub name, or a run's name.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory, or .gguf file, to write.", show_default=False)
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="An adapter's directory; repeatable. A run brings its own.")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option("--weight", help="An adapter's weight, in their order.")] = None,
    how: Annotated[str, typer.Option("--how", help="How several are combined (ftkit list merges).")] = "linear",
    onto: Annotated[
        str, typer.Option("--onto", help="Of a .gguf file: requantized, compensated or apart (ftkit list onto).")
    ] = "requantized",
    rank: Annotated[int, typer.Option("--rank", min=1, max=2**16, help="Of the LoRA that compensates.")] = 8,
    compare: Annotated[bool, typer.Option("--compare", help="Measure each way of --onto, and write nothing.")] = False,
    kind: Annotated[
        str | None, typer.Option("--type", help="bf16, f16 or f32; of a .gguf file as for export.", show_default="bf16")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", metavar="DATA", help="Of a .gguf file as for export.", show_default=False),
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="The directory of runs.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge adapters into a model, and prove that it answers the same.

    The result is a directory that transformers, vLLM and ftkit load, or a .gguf file with the formats of the one it
    comes from. It is read back and compared with the live model under its adapter; beyond the type's bound the command
    fails with exit code 3 and leaves nothing.

    Few bits can't hold a small change: quantizing again loses most of it. --compare measures what each way onto a
    .gguf file costs. `compensated` keeps the codes and writes a small LoRA beside the file (NAME-adapter), `apart` the
    adapter itself; chat and serve take either with --adapter.

    Examples:

      ftkit merge my-run --out my-model

      ftkit merge model.gguf --adapter runs/chef/adapter --adapter runs/pirate/adapter --out both

      ftkit merge my-run --compare

      ftkit merge my-run --onto compensated --rank 8 --out my-model.gguf
    """
    from ftkit.errors import InputError
    from ftkit.merge import compare as measure
    from ftkit.merge import merge

    def report(line: str) -> None:
        print(line, file=sys.stderr)

    if compare:
        if out is not None:
            raise InputError("--compare: expected no --out, since nothing is written, got one")
        found = measure(model, folders=adapter or (), rank=rank, kind=kind, runs_dir=runs_dir, report=report)
        if json:
            print_json({"ways": {name: asdict(measured) for name, measured in found.items()}})
        else:
            _show(found)
        return
    if out is None:
        raise InputError("--out: expected a directory or a .gguf file to write, got none")
    result = merge(
        model,
        out,
        folders=adapter or (),
        weights=weight or None,
        how=how,
        onto=onto,
        rank=rank,
        kind=kind,
        runs_dir=runs_dir,
        calibration=calibration,
        overwrite=overwrite,
        report=report,
    )
    for remark in result.remarks:
        print(f"note: {remark}", file=sys.stderr)
    if json:
        print_json(result.table())
        return
    print(f"parity: {result.parity.sentence()}", file=sys.stderr)
    if result.without is not None:
        print(f"        {result.without.sentence()} without the adapter", file=sys.stderr)
    print(f"{result.out} ({result.bytes / 1e6:.1f} MB)")
    if result.adapter is not None:
        print(f"{result.adapter} ({result.adapter_bytes / 1e6:.1f} MB): use both, as --adapter {result.adapter}")


def _show(found: "dict[str, Measured]") -> None:
    """The ways side by side: what they take, and how near they are to the live model."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("onto", no_wrap=True)
    for heading in ("MB", "adapter MB", "KL mean", "KL max", "top-1", "greedy", "passes"):
        table.add_column(heading, justify="right", no_wrap=True)

    def row(name: str, model_bytes: int | None, adapter_bytes: int, parity: "Parity", passed: str) -> None:
        sizes = ["" if not size else f"{size / 1e6:.1f}" for size in (model_bytes, adapter_bytes)]
        near = f"{parity.kl_mean:.3g}", f"{parity.kl_max:.3g}", f"{parity.top1:.3f}", f"{parity.greedy_match:.2f}"
        table.add_row(name, *sizes, *near, passed)

    without = next((measured.without for measured in found.values() if measured.without is not None), None)
    if without is not None:
        row("(the base alone)", None, 0, without, "")
    for name, made in sorted(found.items(), key=lambda pair: -pair[1].parity.kl_mean):
        row(name, made.bytes, made.adapter_bytes, made.parity, "yes" if made.parity.passed else "no")
    Console().print(table)
