"""Make an API key for `ftkit serve --api-keys`."""

from pathlib import Path
from typing import Annotated

import typer

from ftkit.cli import print_json


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, in metrics and logs.")],
    file: Annotated[
        Path | None, typer.Option("--file", help="A file of keys that gets its hash; made if it is missing.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May manage adapters, files and jobs.")] = False,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model that it may ask for; repeatable. All when not given.")
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option("--requests-per-minute", min=1, show_default=False, help="Most requests a minute.")
    ] = None,
    tokens_per_minute: Annotated[
        float | None, typer.Option("--tokens-per-minute", min=1, show_default=False, help="Most tokens a minute.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make an API key. It is shown once; files hold its hash.

    Examples:

      ftkit keys alice --file keys.toml --tokens-per-minute 20000

      ftkit serve my-run --api-keys keys.toml
    """
    from ftkit.serve import keys

    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    key, lines = keys.fresh(name, admin=admin, models=model, **limits)
    if file is not None:
        keys.append(file, lines)
    if json:
        print_json({"key": key, "name": name, "lines": lines})
    else:
        print(key if file is not None else f"{key}\n\n{lines}", end="\n" if file is not None else "")
