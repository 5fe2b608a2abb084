"""The options of retrieval: an engine over an index of files."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Retriever = Annotated[
    Path | None,
    typer.Option(
        "--retriever",
        metavar="FOLDER|FILE",
        help="Texts, or .jsonl rows with a `text`, that answers are written under.",
    ),
]
RetrieveBy = Annotated[
    str,
    typer.Option("--retrieve-by", metavar="WAY", help="bm25; dense: this model's embeddings; dense=MODEL: another's."),
]
RetrieveEvery = Annotated[int, typer.Option("--retrieve-every", min=1, help="Tokens of an answer between retrievals.")]
Passages = Annotated[int, typer.Option("--passages", min=1, max=32, help="Passages that are retrieved at a time.")]


def found(place: Path, by: str) -> Any:
    """The passages of a place. Raises InputError for a place or a way that can't be used, before a model is loaded."""
    from ftkit import plugins
    from ftkit.engine.indices import read
    from ftkit.errors import InputError

    way, equals, model = by.partition("=")
    if equals and (way != "dense" or not model):
        raise InputError(f"--retrieve-by: expected bm25, dense or dense=MODEL, got {by!r}")
    plugins.load("engine.indices", way)
    return read(place)


def told(collection: Any) -> None:
    """Says on standard error how many passages there are, and what was left out."""
    for note in collection.notes:
        print(f"{collection.path}: {note}", file=sys.stderr)
    print(f"{len(collection.passages):,} passages from {collection.path}", file=sys.stderr, flush=True)


def retrieving(engine: Any, collection: Any, by: str, every: int, passages: int, runs_dir: str) -> Any:
    """The engine with retrieval from these passages."""
    from ftkit import models
    from ftkit.engine.decode.retrieval import Retrieving
    from ftkit.engine.indices import encoder_of, open_index

    way, _, model = by.partition("=")
    encoder = None
    if way == "dense":
        encoder = encoder_of(models.load(models.resolve(model, runs_dir)) if model else engine)
    return Retrieving(engine, collection, open_index(collection, way, encoder), every=every, passages=passages)
