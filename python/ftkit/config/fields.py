"""Tables of settings to frozen dataclasses: unknown keys, wrong types and values out of range, all at once.

A settings class is a frozen, keyword-only dataclass; `option` gives a field its default, its meaning and its limits.
A plugin (a method, an objective, an optimizer, a schedule) declares its own settings in the same way, as a class
called `Config` in its file, and gets the same checks.
"""

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ftkit.errors import InputError

Path = tuple[str, ...]
Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with one key; `path` leads to it, `("training", "max_steps")` for instance."""

    path: Path
    message: str


def option(
    default: Any = dataclasses.MISSING,
    meaning: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a settings class: without a default it is required; the limits hold for numbers."""
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"meaning": meaning, "limits": {word: limit for word, limit in limits.items() if limit is not None}}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read(settings: type[Settings], table: Any, path: Path, problems: list[Problem]) -> Settings | None:
    """An instance of the class from a table; None, and what is wrong added to `problems`, when it cannot be made."""
    before = len(problems)
    if not isinstance(table, Mapping):
        problems.append(Problem(path=path, message=f"expected a table, got {shown(table)}"))
        return None
    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    kinds = typing.get_type_hints(settings)
    for key in table:
        if key not in fields:
            problems.append(Problem(path=(*path, key), message=f"unknown key{nearest(key, fields)}"))
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(kinds[name], field.metadata.get("limits", {}), table[name], (*path, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            expected = _expected(kinds[name], field.metadata.get("limits", {}))
            problems.append(Problem(path=(*path, name), message=f"expected {expected}, got nothing"))
    if len(problems) > before:
        return None
    try:
        return settings(**values)
    except InputError as error:  # what a class checks across its fields
        hint = f" ({error.hint})" if error.hint else ""
        problems.append(Problem(path=path, message=error.message + hint))
        return None


def table_of(settings: Any) -> dict[str, Any]:
    """The instance as a table that `read` takes back and TOML can hold: what is None is left out."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is not None:
            table[field.name] = table_of(value) if dataclasses.is_dataclass(value) else _plain(value)
    return table


def nearest(name: str, known: Any) -> str:
    """`, did you mean 'rank'?`, or the known names when they are few, or nothing."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f", did you mean {near[0]!r}?"
    return f", known: {', '.join(names)}" if names else ", none is known here"


def shown(value: Any) -> str:
    """The value as a message shows it, with its kind in TOML's words, and cut when it is long."""
    kinds = {bool: "", int: "", float: "", str: "", list: "the list ", tuple: "the list ", dict: "the table "}
    words = {True: "true", False: "false"}
    text = words[value] if isinstance(value, bool) else repr(list(value) if isinstance(value, tuple) else value)
    return kinds.get(type(value), f"{type(value).__name__} ") + (text if len(text) <= 80 else text[:77] + "...")


def _value(kind: Any, limits: dict[str, float], value: Any, path: Path, problems: list[Problem]) -> Any:
    """The value as the field holds it; a problem is added when it does not fit."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return read(kind, value, path, problems)
    fits, converted = _convert(kind, value)
    if not fits or not _within(limits, converted):
        problems.append(Problem(path=path, message=f"expected {_expected(kind, limits)}, got {shown(value)}"))
        return None
    return converted


def _convert(kind: Any, value: Any) -> tuple[bool, Any]:
    """(does the value fit the kind, the value as the field holds it)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            fits, converted = _convert(choice, value)
            if fits:
                return True, converted
        return False, None
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments), value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return False, None
        parts = [_convert(arguments[0], part) for part in value]
        return all(fits for fits, _ in parts), origin(part for _, part in parts)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return False, None
        entries = {key: _convert(arguments[1], part) for key, part in value.items()}
        return all(fits for fits, _ in entries.values()), {key: part for key, (_, part) in entries.items()}
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        return fits, float(value) if fits else None
    if kind is type(None):
        return value is None, None
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool)), value


def _within(limits: dict[str, float], value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    if not math.isfinite(value):
        return False
    tests = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
    return all(tests[word](value, limit) for word, limit in limits.items())


def _expected(kind: Any, limits: dict[str, float]) -> str:
    """The kind and its limits in words, such as `an integer, at least 1`."""
    bounds = " and ".join(f"{word} {limit:.8g}" for word, limit in limits.items())
    return _words(kind) + (f", {bounds}" if bounds else "")


def _words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(choice) for choice in arguments if choice is not type(None))
    if origin is typing.Literal:
        choices = ", ".join(repr(choice) for choice in arguments)
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin in (tuple, list):
        return "a list" if arguments[0] is Any else f"a list, each {_words(arguments[0])}"
    if origin is dict:
        return "a table"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _plain(value: Any) -> Any:
    """The value in TOML's kinds."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    return value
