"""TOML files whose errors know their line, `a.b=c` from the command line, and writing a table back."""

import re
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from ftkit.errors import InputError


def read_file(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The file's table, and the line on which each key stands. Raises InputError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text, got the byte 0x{error.object[error.start]:02x} at offset {error.start}",
            "a configuration is a TOML file",
        ) from None
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    try:
        return tomllib.loads(text), lines_of(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: expected TOML, got: {str(error)[:200]}") from None


def lines_of(text: str) -> dict[tuple[str, ...], int]:
    """The line, from 1, of each key and table in valid TOML: a statement is what parses on its own."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    statement, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not statement:
            start = number
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # the first lines of a value of several lines
        if re.match(r"\s*\[", statement):
            table = _paths(parsed)[-1] if parsed else table
            lines.setdefault(table, start)
        else:
            for path in _paths(parsed):
                lines.setdefault((*table, *path), start)
        statement = ""
    return lines


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b=c` as (("a", "b"), c), where c is a TOML value, or plain text when it is none."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise InputError(f"--set: expected KEY=VALUE, got {text!r}", "for instance --set optimizer.learning_rate=1e-4")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return path, value


def write(table: dict[str, Any]) -> str:
    """The table as TOML text."""
    return tomli_w.dumps(table)


def _paths(table: Any) -> list[tuple[str, ...]]:
    """Every path in nested tables, inner ones after those that hold them."""
    found: list[tuple[str, ...]] = []
    if isinstance(table, list):  # an array of tables
        table = table[-1] if table else {}
    if isinstance(table, dict):
        for key, value in table.items():
            found.append((key,))
            found += [(key, *path) for path in _paths(value)]
    return found
