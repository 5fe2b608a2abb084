"""Merge adapters into a model, and prove that it answers the same."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ftkit.cli import print_json


def command(
    model: Annotated[
        str, typer.Argument(help="Directory of safetensors, .gguf file, hub name, or a run's name.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory, or .gguf file, to write.", show_default=False)],
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="An adapter's directory; repeatable. A run brings its own.")
    ] = None,
    weight: Annotated[list[float] | None, typer.Option("--weight", help="An adapter's weight, in their order.")] = None,
    how: Annotated[str, typer.Option("--how", help="How several are combined (ftkit list merges).")] = "linear",
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

    Examples:

      ftkit merge my-run --out my-model

      ftkit merge model.gguf --adapter runs/chef/adapter --adapter runs/pirate/adapter --out both
    """
    from ftkit.merge import merge

    result = merge(
        model,
        out,
        folders=adapter or (),
        weights=weight or None,
        how=how,
        kind=kind,
        runs_dir=runs_dir,
        calibration=calibration,
        overwrite=overwrite,
        report=lambda line: print(line, file=sys.stderr),
    )
    for remark in result.remarks:
        print(f"note: {remark}", file=sys.stderr)
    if json:
        print_json(result.table())
        return
    print(f"parity: {result.parity.sentence()}", file=sys.stderr)
    print(f"{result.out} ({result.bytes / 1e6:.1f} MB)")
