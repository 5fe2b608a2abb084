"""Which layers a method is put on: by the rules of PEFT's `target_modules`."""

import re
from collections.abc import Iterable, Sequence

from ftkit.errors import InputError, did_you_mean

ALL_LINEAR = "all-linear"


def select(names: Iterable[str], pattern: str | Sequence[str], what: str = "target_modules") -> list[str]:
    """The names that the pattern selects, in order. Raises InputError for a pattern, or a part of it, without any.

    `all-linear`: all but the head. A list: the names that are one of it, or end in a dot and one of it. Another
    text: a regular expression for the whole name.
    """
    known = list(names)
    if pattern == ALL_LINEAR:
        return [name for name in known if name != "lm_head"]
    if isinstance(pattern, str):
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise InputError(f"{what}: expected a regular expression, got {pattern!r} ({error})") from None
        found = [name for name in known if expression.fullmatch(name)]
        if not found:
            raise InputError(f"{what}: expected a pattern of layers, got {pattern!r}, which matches none", _hint(known))
        return found
    if not pattern:
        raise InputError(f"{what}: expected names of layers, got none", _hint(known))
    for part in pattern:
        if not any(_is(name, part) for name in known):
            near = did_you_mean(part, {name.rpartition(".")[2] for name in known})
            raise InputError(f"{what}: expected names of layers, got {part!r}", near or _hint(known))
    return [name for name in known if any(_is(name, part) for part in pattern)]


def _is(name: str, part: str) -> bool:
    return name == part or name.endswith(f".{part}")


def _hint(known: list[str]) -> str:
    return "this model has " + ", ".join(sorted({name.rpartition(".")[2] for name in known}))
