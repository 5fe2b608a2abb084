"""Write a model for other runtimes: GGUF, safetensors, or the adapter for llama.cpp or PEFT."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ftkit.cli import print_json


def command(
    model: Annotated[
        str, typer.Argument(help="Directory of safetensors, .gguf file, hub name, or a run's name.", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", help="Target: gguf, gguf-lora, safetensors or peft.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="File or directory to write.", show_default=False)],
    kind: Annotated[
        str | None,
        typer.Option("--type", help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_1 …; source: as in the GGUF file."),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option("--quant", help="Matrices of safetensors: nf4, fp4 (bitsandbytes) or int4 (compressed-tensors)."),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round float offsets to the whole zero points of int4.")
    ] = False,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="An adapter's directory, merged first.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="DATA",
            help="Rows like those to come: a quantized type keeps what matters to them. Best below 6 bits.",
        ),
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="The directory of runs.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a model for other runtimes: GGUF, safetensors, or the adapter for llama.cpp or PEFT.

    What was written is read back and compared with the live model; beyond the type's bound the command fails with exit
    code 3 and leaves nothing.

    Examples:

      ftkit export my-run --to gguf --type q4_k_m --out my-model.gguf

      ftkit export model.gguf --adapter runs/my-run/adapter --to safetensors --out my-model

      ftkit export my-run --to gguf --type q3_k_m --calibration chats.jsonl --out small.gguf

      ftkit export my-run --to safetensors --quant nf4 --out my-model-4bit

      ftkit export my-run --to peft --out my-adapter

      ftkit export my-run --to gguf-lora --out my-adapter.gguf
    """
    from ftkit import export

    result = export.export(
        model,
        out,
        to=to,
        kind=kind,
        quant=quant,
        requantize=requantize,
        adapter=adapter,
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
