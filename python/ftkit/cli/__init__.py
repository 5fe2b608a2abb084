"""The command line: one file a command. It parses, calls and prints; there is no logic here.

A file `cli/NAME.py` with a function `command` is `ftkit NAME`; one with a `typer.Typer` called `command` is a group.
"""

import importlib.metadata
import json
import sys
from typing import Annotated, Any

import typer

from ftkit import plugins
from ftkit.errors import FtkitError

_SUMMARY = "Finetune a language model on your own data and serve the result, on one machine."


def application() -> typer.Typer:
    """The command line with every file of this room as a command."""
    app = typer.Typer(
        help=_SUMMARY,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback(help=_SUMMARY)(_options)
    for name in plugins.names("cli"):
        command = plugins.load("cli", name).command
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _version(asked: bool) -> None:
    if asked:
        print(f"ftkit {importlib.metadata.version('ftkit')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """The options of ftkit itself."""


def main() -> None:
    """The entry point: runs a command and turns its outcome into an exit code."""
    try:
        application()(standalone_mode=True)
    except FtkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        print(
            "error: expected memory for the next tensor, got none\nhint: ftkit plan shows smaller settings",
            file=sys.stderr,
        )
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on standard output, for `--json`."""
    print(json.dumps(document, ensure_ascii=False))
