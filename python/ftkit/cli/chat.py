"""Chat with a model in the terminal, or ask one question through a pipe."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ftkit.cli import print_json
from ftkit.cli._retriever import Passages, RetrieveBy, RetrieveEvery, Retriever, found, retrieving, told


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Directory of safetensors, .gguf file, hub name, a run's name, or a server's address."
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="[NAME=]DIR", help="An adapter; the first answers. Repeatable."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Likeliest tokens up to this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="The k likeliest tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Tokens this likely beside the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Above 1: fewer repetitions.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, max=2**31, help="Most tokens of an answer.")] = 512,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Same seed, same answers.", show_default=False)
    ] = None,
    engine: Annotated[
        Literal["ftkit", "llama-cpp"], typer.Option(help="llama-cpp: the same over llama.cpp.")
    ] = "ftkit",
    quant: Annotated[
        str,
        typer.Option("--quant", help="none, gguf, nf4, … (ftkit list quant); auto: the run's, or the file's blocks."),
    ] = "auto",
    fast_decode: Annotated[
        bool, typer.Option("--fast-decode", help="Round activations to 8 bits: faster, not quite the same answers.")
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option("--draft", metavar="MODEL", help="A smaller model with the same tokens, which guesses the next."),
    ] = None,
    retriever: Retriever = None,
    retrieve_by: RetrieveBy = "bm25",
    retrieve_every: RetrieveEvery = 16,
    passages: Passages = 1,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="FTKIT_API_KEY", help="The server's key, with an address.", show_envvar=True),
    ] = None,
    runs_dir: Annotated[str, typer.Option("--runs-dir", help="The directory of runs.")] = "runs",
    json: Annotated[bool, typer.Option("--json", help="One question on standard input, one JSON document.")] = False,
) -> None:
    """Chat with a model in the terminal, or ask one question through a pipe.

    Examples:

      ftkit chat my-run

      ftkit chat model.gguf --adapter chef=runs/chef/adapter --system "Be brief."

      ftkit chat http://127.0.0.1:8000

      ftkit chat model.gguf --retriever notes

      echo "What is a ragged batch?" | ftkit chat model.gguf --temperature 0
    """
    from ftkit.engine import Sampling
    from ftkit.errors import InputError

    remote = model.startswith(("http://", "https://"))
    if draft is not None and (remote or engine == "llama-cpp"):
        raise InputError("--draft: expected a model that runs here, in --engine ftkit, got another")
    question = None
    if json or not sys.stdin.isatty():
        question = _question()
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        seed=seed,
    )
    if retriever is not None and (remote or engine != "ftkit"):
        given = "an address" if remote else f"--engine {engine}"
        raise InputError(f"--retriever: expected a model that answers here, got {given}")
    collection = None if retriever is None else found(retriever, retrieve_by)
    if collection is not None:
        told(collection)
    if remote:
        answering, names = _remote(model, api_key, adapter or [])
        first, rate, planned = None, answering.rate, answering.planned
    else:
        options: dict[str, Any] = {"runs_dir": runs_dir, "quant": quant, "fast_decode": fast_decode, "draft": draft}
        answering, names, rate, planned = _engine(model, adapter or [], engine, **options)
        first = names[0] if names else None
    try:
        if collection is not None:
            answering = retrieving(answering, collection, retrieve_by, retrieve_every, passages, runs_dir)
        from ftkit.cli._chat import Chat, one_shot

        if question is None:
            Chat(answering, sampling, system=system, model=first, names=names, rate=rate, planned=planned).run(
                _history()
            )
            return
        document = one_shot(answering, question, sampling, system=system, model=first, show=not json)
    finally:
        answering.close()
    if json:
        print_json(document)


def _question() -> str:
    """All of standard input. Raises InputError when there is nothing in it, or no text."""
    from ftkit.errors import InputError

    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: expected UTF-8 text, got {error}") from None
    if not text:
        raise InputError("standard input: expected a question, got nothing")
    return text


def _remote(url: str, api_key: str | None, adapters: list[str]) -> tuple[Any, list[str]]:
    """A server, and the names that it may be asked by."""
    from ftkit.engine.remote import Remote
    from ftkit.errors import InputError

    if adapters:
        raise InputError("--adapter: expected none with a server's address, got some", "the server loads its own")
    answering = Remote(url, api_key)
    return answering, answering.models


def _engine(model: str, adapters: list[str], engine: str, **options: Any) -> tuple[Any, list[str], Any, Any]:
    """The engine, the names of its adapters, the first of which answers, who takes ratings, and who knows plans."""
    from ftkit.errors import InputError

    if engine == "llama-cpp":
        from ftkit.engine.llama_cpp import LlamaCpp

        if adapters:
            raise InputError("--engine llama-cpp: expected no adapters, got some", "ftkit export merges them first")
        return LlamaCpp(Path(model)), [], None, None
    from ftkit.engine import launch

    named: dict[str, str | Path] = {}
    for number, pair in enumerate(adapters, 1):
        name, equals, folder = pair.partition("=")
        if not equals:
            name, folder = (f"adapter-{number}" if len(adapters) > 1 else "adapter"), pair
        named[name] = folder
    print("loading …", file=sys.stderr, flush=True)
    answering = launch(model, named, **options)
    own = [answering.default] if answering.default != answering.name else []
    runs_dir = options["runs_dir"]
    return answering, [*named, *own], _rater(answering, named, runs_dir), _planner(named, runs_dir)


def _rater(answering: Any, named: dict[str, str | Path], runs_dir: str) -> Any:
    """Keeps ratings where a server of these runs keeps them."""
    from ftkit.serve import contents, feedback

    def hash_of(name: str) -> str | None:
        return contents.of(Path(named[name])).hash if name in named else None

    def rate(body: dict[str, Any]) -> None:
        row = feedback.row_of(body, answering.default, hash_of) | {"caller": "chat"}
        feedback.keep(Path(runs_dir) / ".serve" / "feedback" / feedback.FILE, row)

    return rate


def _planner(named: dict[str, str | Path], runs_dir: str) -> Any:
    """Reads what a run planned, where an adapter is still in its run's directory."""
    from ftkit.train.directory import RunDirectory
    from ftkit.train.events import read

    def planned(name: str | None) -> dict[str, int] | None:
        if name is None:
            return None
        folder = Path(named[name]).parent if name in named else Path(runs_dir) / name
        events = read(RunDirectory(path=folder).events)
        return next((event["planned_by_category"] for event in events if event["event"] == "memory"), None)

    return planned


def _history() -> Path | None:
    """Where questions are remembered; None where that can't be."""
    from ftkit.data import cache_directory

    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / "chat-history"
