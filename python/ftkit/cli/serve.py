"""Serve a model over OpenAI's API, with a web chat."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ftkit.cli import print_json
from ftkit.cli._retriever import Passages, RetrieveBy, RetrieveEvery, Retriever, found, retrieving, told


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory of safetensors, .gguf file, hub name, or a run's name.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="An adapter that requests may ask for by name; repeatable."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="FTKIT_API_KEY", help="Key that requests must bring.", show_envvar=True),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys", help="A file of keys with their limits (`ftkit keys`); may change.", show_default=False
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option("--state-dir", help="Where files, jobs and adapters are kept (default: RUNS_DIR/.serve)."),
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(
            "--adapter-dir",
            metavar="DIR",
            help="Every adapter in it answers to its folder's name, read when it is needed; the API loads from here "
            "(not given: from RUNS_DIR).",
            show_default=False,
        ),
    ] = None,
    upload_mib: Annotated[int, typer.Option("--upload-mib", min=1, max=65536, help="Largest uploaded file.")] = 512,
    access_log: Annotated[
        Path | None,
        typer.Option("--access-log", help="A file that gets a line for each answer, without contents; -: stderr."),
    ] = None,
    stuck_seconds: Annotated[
        float, typer.Option("--stuck-seconds", min=0.1, help="A step that takes longer: /health and /ready say 503.")
    ] = 60,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Most tokens of a prompt and its answer.", show_default=False)
    ] = None,
    pool_mib: Annotated[
        int | None,
        typer.Option("--pool-mib", min=1, help="Memory for keys and values, in MiB.", show_default=False),
    ] = None,
    kv_cache: Annotated[
        Literal["full", "int8"],
        typer.Option(
            "--kv-cache", help="int8: keys and values in 8 bits, in a third of the memory, not quite the same."
        ),
    ] = "full",
    max_sequences: Annotated[int, typer.Option(min=1, max=256, help="Most answers at the same time.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most requests in the queue; then 429.")] = 256,
    draft: Annotated[
        str | None,
        typer.Option("--draft", metavar="MODEL", help="A smaller model with the same tokens, which guesses the next."),
    ] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=15,
            help="Most tokens guessed (without --draft: from what was said before) and checked in one step.",
            show_default="0; 4 with --draft",
        ),
    ] = None,
    first_token_seconds: Annotated[
        float | None,
        typer.Option(min=0.001, help="Refuse what can't have its first token in this time.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Processor threads.", show_default=False)
    ] = None,
    quant: Annotated[
        str,
        typer.Option("--quant", help="none, gguf, nf4, … (ftkit list quant); auto: the run's, or the file's blocks."),
    ] = "auto",
    fast_decode: Annotated[
        bool, typer.Option("--fast-decode", help="Round activations to 8 bits: faster, not quite the same answers.")
    ] = False,
    retriever: Retriever = None,
    retrieve_by: RetrieveBy = "bm25",
    retrieve_every: RetrieveEvery = 16,
    passages: Passages = 1,
    runs_dir: Annotated[str, typer.Option("--runs-dir", help="The directory of runs.")] = "runs",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document when ready.")] = False,
) -> None:
    """Serve a model over OpenAI's API, with a web chat at /.

    The address is the first line on standard error, when requests are taken. Ctrl-C lets answers under way finish;
    a second one drops them.

    Examples:

      ftkit serve SmolLM2.gguf

      ftkit serve my-run --port 9000

      ftkit serve SmolLM2.gguf --adapter pirate=runs/pirate/adapter --adapter chef=runs/chef/adapter

      ftkit serve SmolLM2.gguf --retriever notes

      curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    from ftkit import _core
    from ftkit.errors import InputError

    named: dict[str, str] = {}
    for pair in adapter or []:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder) or name in named:
            raise InputError(f"--adapter: expected NAME=DIR with names of their own, got {pair!r}")
        named[name] = folder
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise InputError(f"--adapter-dir: expected a directory, got {adapter_dir}")
    if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key != ""):
        raise InputError("--api-key: expected printable ASCII without spaces around it, got another or an empty one")
    # Keys, texts and port first: they fail at once, a model loads for a while.
    from ftkit.serve import keys as key_file

    keys = None if api_keys is None else key_file.read(api_keys)
    collection = None if retriever is None else found(retriever, retrieve_by)
    listener = _core.Listener(host, port)

    import torch

    from ftkit import engine, models
    from ftkit.serve import Desk

    if threads is not None:
        torch.set_num_threads(threads)
    launched = engine.launch(
        model,
        named,
        folder=adapter_dir,
        runs_dir=runs_dir,
        quant=quant,
        fast_decode=fast_decode,
        context_tokens=context,
        pool_bytes=None if pool_mib is None else pool_mib << 20,
        kv_cache=kv_cache,
        max_sequences=max_sequences,
        max_batch_tokens=max(512, max_sequences),
        max_waiting=max_waiting,
        draft=draft,
        draft_tokens=draft_tokens,
    )

    def ready() -> None:
        names = [launched.name, *(adapter["id"] for adapter in desk.adapters.every()["data"])]
        print(listener.url, file=sys.stderr, flush=True)
        print(f"models: {', '.join(names)}; chat in the browser at {listener.url}/", file=sys.stderr)
        if collection is not None:
            told(collection)
        for problem in desk.adapters.problems:
            print(f"warning: {problem}", file=sys.stderr)
        if not listener.loopback and api_key is None and keys is None:
            print("warning: other machines can reach this server, and it has no --api-key", file=sys.stderr)
        if json:
            print_json({"url": listener.url, "models": names})
            sys.stdout.flush()
        desk.start()

    with launched:
        author = None
        if collection is not None:
            from ftkit.serve.author import Author

            author = Author(retrieving(launched, collection, retrieve_by, retrieve_every, passages, runs_dir))
        source = models.resolve(model, runs_dir)
        given = {name: Path(folder) for name, folder in named.items()}
        if source.adapter is not None:
            given[source.name] = source.adapter
        desk = Desk(
            launched,
            state_dir or Path(runs_dir) / ".serve",
            adapter_dir=adapter_dir or Path(runs_dir),
            given=given,
            quant=models.scheme_at_rest(source, "cpu", torch.float32) if quant == "auto" else quant,
        )
        watch = None if api_keys is None else key_file.Watch(api_keys, launched.set_keys)
        try:
            launched.serve(
                listener,
                ready,
                api_key=api_key,
                keys=keys,
                desk=desk,
                author=author,
                access_log=access_log,
                upload_bytes=upload_mib << 20,
                stuck_seconds=stuck_seconds,
                first_token_seconds=first_token_seconds,
            )
        finally:
            if watch is not None:
                watch.close()
            desk.close()
