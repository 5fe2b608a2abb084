"""Measure a model: perplexity on held-out rows, right answers, distance from another model."""

from pathlib import Path
from typing import Annotated

import typer

from ftkit.cli import print_json


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory of safetensors, .gguf file, hub name, or a run's name.")
    ],
    suite: Annotated[str, typer.Option(help="What is measured (ftkit list suites).")] = "perplexity",
    adapter: Annotated[Path | None, typer.Option(help="An adapter's directory. A run brings its own.")] = None,
    data: Annotated[Path | None, typer.Option(help="What is asked: a dataset, or a file of questions.")] = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="Another model to compare with.")] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant", help="How matrices are held: none, gguf, nf4, … (ftkit list quant).", show_default=False
        ),
    ] = None,
    fast_decode: Annotated[
        bool, typer.Option("--fast-decode", help="Round activations to 8 bits, as chat and serve do with it.")
    ] = False,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="The directory of runs.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure a model: perplexity on held-out rows, right answers, distance from another model.

    Examples:

      ftkit eval my-run --data held-out.jsonl

      ftkit eval my-model --against model.gguf --data held-out.jsonl

      ftkit eval model.gguf --fast-decode --against model.gguf --data held-out.jsonl

      ftkit eval my-run --suite keywords --data questions.jsonl
    """
    from ftkit import models, plugins
    from ftkit.quant._packed import round_activations

    chosen = plugins.load("eval", suite)
    place = models.resolve(model, runs_dir)
    other = None if against is None else models.load(models.resolve(against, runs_dir))
    loaded = models.load(place, quant=quant or models.scheme_at_rest(place))
    if fast_decode:
        round_activations(loaded.model)
    table = chosen.evaluate(loaded, adapter or place.adapter, data, other)
    if json:
        print_json(table)
        return
    for name, value in table.items():
        print(f"{name:<16} {value:.6g}" if isinstance(value, float) else f"{name:<16} {value}")
