"""Errors that people read: what is wrong, what was expected, and a hint at the remedy.

The command line turns them into exit codes: 0 done, 1 a failure, 2 wrong usage or bad input, 3 a gate said no,
130 interrupted after a clean checkpoint. The core raises the same classes.
"""

import difflib
from collections.abc import Iterable


class FtkitError(Exception):
    """Something failed that is not the user's fault. `message` is lower case and has both values."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InputError(FtkitError):
    """What the user gave cannot be used; nothing was changed."""

    exit_code = 2


class GateError(FtkitError):
    """A gate (parity, evaluation) compared and said no."""

    exit_code = 3


class Interrupted(FtkitError):
    """The user stopped a run, and its state is safe on disk."""

    exit_code = 130


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint with the known name nearest to `name`, or with all of them when none is near and they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names)}" if 0 < len(names) <= 30 else None
