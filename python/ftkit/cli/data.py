"""Shows what a model would see of a dataset: counts, lengths, and which tokens are trained on; or makes one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ftkit import _core
    from ftkit.config import DataConfig

command = typer.Typer(
    help="What the model will see of a dataset: check counts everything, show prints examples, pack fills the cache; "
    "generate lets a model write one.",
    no_args_is_help=True,
)

_DATA = Annotated[
    str, typer.Argument(metavar="DATA", help="JSONL, JSON, CSV, Parquet or .txt file, a directory, or -.")
]
_MODEL = Annotated[str, typer.Option(help="The model whose template and tokenizer are used.")]
_MAX_TOKENS = Annotated[int, typer.Option(min=8, help="Tokens of a packed row.")]
_TRAIN_ON = Annotated[Literal["assistant", "last", "all"], typer.Option(help="Which tokens are trained on.")]
_LONG = Annotated[Literal["truncate", "split"], typer.Option(help="What becomes of rows that are too long.")]
_SCHEMA = Annotated[str, typer.Option(help="How rows are laid out; auto looks at them.")]
_COLUMN = Annotated[
    list[str] | None, typer.Option(metavar="OURS=THEIRS", help="The data's name for a column of ours; repeatable.")
]
_SKIP = Annotated[int, typer.Option(min=0, help="Unreadable rows that are let pass.")]
_JSON = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


@command.command()
def check(
    data: _DATA,
    model: _MODEL,
    max_tokens: _MAX_TOKENS = 1024,
    train_on: _TRAIN_ON = "assistant",
    long_rows: _LONG = "truncate",
    schema: _SCHEMA = "auto",
    column: _COLUMN = None,
    skip_bad_rows: _SKIP = 0,
    as_json: _JSON = False,
) -> None:
    """Reads everything and counts: bad, cut, repeated and untrained rows, lengths, and how full packed rows are.

    Example: ftkit data check chats.jsonl --model model.gguf --max-tokens 2048
    """
    config = _config(data, max_tokens, train_on, long_rows, schema, column, skip_bad_rows)
    _, prepared = _encode(config, model, as_json)
    _report(config, prepared, as_json)


@command.command()
def pack(
    data: _DATA,
    model: _MODEL,
    max_tokens: _MAX_TOKENS = 1024,
    train_on: _TRAIN_ON = "assistant",
    long_rows: _LONG = "truncate",
    schema: _SCHEMA = "auto",
    column: _COLUMN = None,
    skip_bad_rows: _SKIP = 0,
    as_json: _JSON = False,
) -> None:
    """Prepares the data and leaves it in the cache, so that a later run starts at once.

    Example: ftkit data pack chats/ --model model.gguf --max-tokens 4096
    """
    check(data, model, max_tokens, train_on, long_rows, schema, column, skip_bad_rows, as_json)


@command.command()
def show(
    data: _DATA,
    model: _MODEL,
    rows: Annotated[int, typer.Option(min=1, help="Examples to print.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    max_tokens: _MAX_TOKENS = 1024,
    train_on: _TRAIN_ON = "assistant",
    long_rows: _LONG = "truncate",
    schema: _SCHEMA = "auto",
    column: _COLUMN = None,
    skip_bad_rows: _SKIP = 0,
    as_json: _JSON = False,
) -> None:
    """Prints examples as the model sees them, with the tokens that are trained on in colour.

    Example: ftkit data show chats.jsonl --model model.gguf --rows 2
    """
    from rich.console import Console

    from ftkit.cli import print_json
    from ftkit.errors import InputError

    config = _config(data, max_tokens, train_on, long_rows, schema, column, skip_bad_rows)
    tokenizer, prepared = _encode(config, model, as_json)
    if start >= len(prepared):
        raise InputError(f"--start: expected a sequence below {len(prepared)}, got {start}")
    chosen = range(start, min(start + rows, len(prepared)))
    if as_json:
        examples = [dict(zip(("tokens", "trained"), prepared.sequence(index), strict=True)) for index in chosen]
        print_json({"examples": examples})
        return
    console = Console()
    for index in chosen:
        ids, trained = prepared.sequence(index)
        console.rule(f"sequence {index}: {len(ids):,} tokens, {sum(trained):,} trained", align="left")
        console.print(_coloured(tokenizer, ids, trained, plain=not console.is_terminal), soft_wrap=True)
    console.print("green: trained on" if console.is_terminal else "⟦…⟧: trained on", style="dim")


@command.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that writes; a run brings its adapter.")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Where the rows go.")],
    rows: Annotated[int, typer.Option(min=1, help="Texts to write.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same texts.")] = 0,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="The directory of runs.")] = Path("runs"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    as_json: _JSON = False,
) -> None:
    """Lets a model write texts from nothing, at temperature 1: rows of text to distil from without any data.

    Example: ftkit data generate model.gguf --rows 256 --out self.jsonl
    """
    import json

    from rich.console import Console

    from ftkit.cli import print_json
    from ftkit.data import generate as writing
    from ftkit.engine import launch
    from ftkit.errors import InputError
    from ftkit.train import files

    if out.exists() and not overwrite:
        raise InputError(f"{out}: expected a path that is free, got one that exists", "--overwrite replaces it")
    console = Console(stderr=True, quiet=as_json)
    with console.status("loading the model") as status, launch(model, runs_dir=runs_dir) as engine:

        def progress(count: int) -> None:
            status.update(f"{count:,} of {rows:,} texts")
            if not console.is_terminal:
                console.print(f"{count:,} of {rows:,} texts", markup=False, highlight=False)

        texts = writing.generate(engine, rows, tokens, seed, progress)
    files.write_text(out, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    table = {"out": str(out), "rows": len(texts), "bytes": out.stat().st_size}
    if as_json:
        print_json(table)
    else:
        console.print(f"{out}: {len(texts):,} rows", markup=False, highlight=False)


def _config(
    data: str, max_tokens: int, train_on: Any, long_rows: Any, schema: str, column: list[str] | None, skip: int
) -> "DataConfig":
    from ftkit.config import DataConfig
    from ftkit.errors import InputError

    columns: dict[str, str] = {}
    for pair in column or []:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise InputError(f"--column: expected OURS=THEIRS, got {pair!r}", "such as --column prompt=question")
        columns[ours] = theirs
    return DataConfig(
        path=data,
        schema=schema,
        columns=columns,
        train_on=train_on,
        max_tokens=max_tokens,
        long_rows=long_rows,
        skip_bad_rows=skip,
    )


def _encode(config: "DataConfig", model: str, as_json: bool) -> tuple["_core.Tokenizer", "_core.PreparedData"]:
    from rich.console import Console

    from ftkit import data, models

    path = models.resolve(model).path
    tokenizer = models.tokenizer_of(path)
    console = Console(stderr=True, quiet=as_json)
    with console.status("reading rows") as status:
        prepared = data.encode(
            config,
            tokenizer,
            models.template_of(path),
            progress=lambda rows: status.update(f"reading rows: {rows:,}"),
        )
    for problem in prepared.problems:
        console.print(f"skipped {problem}", style="yellow", markup=False, highlight=False)
    return tokenizer, prepared


def _report(config: "DataConfig", prepared: "_core.PreparedData", as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from ftkit.cli import print_json

    counts = prepared.statistics
    packed, _ = prepared.split(config.max_tokens, 0, 0.0)
    if as_json:
        print_json({**counts, "fill": packed.fill, "packed_rows": len(packed), "fingerprint": prepared.fingerprint})
        return
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column()
    for name, meaning in _MEANINGS.items():
        style = "yellow" if name in _NOTABLE and counts[name] else ""
        table.add_row(f"{counts[name]:,}", meaning, style=style)
    share = counts["trained_tokens"] / counts["tokens"]
    table.add_row(f"{share:.1%}", "of the tokens are trained on")
    table.add_row(f"{len(packed):,}", f"packed rows of {config.max_tokens:,} tokens, {packed.fill:.1%} full")
    console.print(table)
    console.print("\ntokens a sequence", style="bold")
    for line in _histogram(prepared.lengths()):
        console.print(line, markup=False, highlight=False)


_MEANINGS = {
    "rows": "rows",
    "bad_rows": "bad rows, skipped",
    "duplicate_rows": "rows that repeat an earlier one",
    "truncated_rows": "rows that were too long and lost turns",
    "split_rows": "rows that were too long and were split",
    "masked_rows": "rows left out: nothing in them is trained on",
    "longest_row": "tokens in the longest row",
    "sequences": "sequences",
    "tokens": "tokens",
    "trained_tokens": "tokens that are trained on",
}
_NOTABLE = ("bad_rows", "duplicate_rows", "truncated_rows", "masked_rows")


def _histogram(lengths: list[int], width: int = 40) -> list[str]:
    """A bar for each power of two, with the count behind it."""
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length.bit_length()] = counts.get(length.bit_length(), 0) + 1
    most = max(counts.values())
    lines = []
    for bits in range(min(counts), max(counts) + 1):
        count = counts.get(bits, 0)
        bar = "█" * max(round(width * count / most), 1 if count else 0)
        lines.append(f"{2 ** (bits - 1):>7,} to {2**bits - 1:<7,} {bar} {count:,}")
    return lines


def _coloured(tokenizer: "_core.Tokenizer", ids: list[int], trained: list[bool], *, plain: bool) -> Any:
    """The tokens as text, runs of trained ones in green, or between brackets where there is no colour."""
    from itertools import groupby

    from rich.text import Text

    text = Text()
    for is_trained, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run], skip_special=False)
        if is_trained and plain:
            text.append(f"⟦{piece}⟧")
        else:
            text.append(piece, style="green" if is_trained else "dim")
    return text
