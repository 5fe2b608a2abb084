"""Finetune a model on your data."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ftkit.cli import print_json
from ftkit.cli._run_options import with_run_options


@with_run_options
def command(
    config_path: Path | None,
    overrides: dict[str, Any],
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run from its last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Finetune a model on your data.

    The result is a directory runs/NAME with the adapter, checkpoints, events.jsonl and report.html. Ctrl-C stops after
    the step, with a checkpoint; a second one stops at once.

    Examples:

      ftkit train --model model.gguf --data chats.jsonl

      ftkit train run.toml --set optimizer.learning_rate=1e-4 --name second-try

      ftkit train --model model.gguf --data long.jsonl --max-tokens 8192 --sparse-tokens 0.25

      ftkit train --resume --name second-try

      torchrun --nproc-per-node 2 -m ftkit train run.toml --set training.gradient_accumulation_steps=2
    """
    from ftkit import train
    from ftkit.config import RunConfig
    from ftkit.train.progress import ProgressLine

    first = os.environ.get("RANK", "0") == "0"  # of several processes, the one that speaks
    config = train.resumed_config(config_path, overrides) if resume else RunConfig.from_toml(config_path, overrides)
    line = ProgressLine()
    try:
        result = train.run(config, line, resume=resume, overwrite=overwrite)
    finally:
        line.close()
    if not first:
        return
    if json:
        print_json(result.table())
    else:
        runs = "" if config.output.runs_dir == "runs" else f" --runs-dir {config.output.runs_dir}"
        print(f"report: {result.report}\nnext:   ftkit chat {result.run}{runs}", file=sys.stderr)
