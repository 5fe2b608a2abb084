"""The operations that a model is made of: one file an operation, its documented reference in plain torch first.

An operation is a function decorated with `operation`: the reference, which says what is computed. Faster ways to
compute the same register as its backends, latest first, each with a test of the arguments that it supports:

    @operation
    def swiglu(gate, up): ...

    @swiglu.backend("fused", lambda gate, up: gate.device.type == "cpu")
    def _fused(gate, up): ...

The environment variable `FTKIT_KERNELS` pins the choice: `reference`, or the names of the backends that may be used.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, ParamSpec, TypeVar

from ftkit import plugins
from ftkit.errors import InputError, did_you_mean

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PIN = "FTKIT_KERNELS"
_backends: set[str] = {"reference"}


class Operation(Generic[Arguments, Result]):
    """A reference with the faster backends that stand in for it where they can."""

    def __init__(self, reference: Callable[Arguments, Result]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self._fast: list[tuple[str, Callable[Arguments, bool], Callable[Arguments, Result]]] = []

    def backend(
        self, name: str, supports: Callable[Arguments, bool]
    ) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
        """Registers the decorated function as backend `name`, for the arguments of which `supports` says true."""

        def register(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
            self._fast.insert(0, (name, supports, function))
            _backends.add(name)
            return function

        return register

    @property
    def backends(self) -> list[str]:
        """The names of the backends in the order in which they are tried, the reference last."""
        return [name for name, _, _ in self._fast] + ["reference"]

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """The operation, by the first backend that is allowed and supports the arguments."""
        allowed = _allowed(os.environ.get(PIN, ""))
        if allowed != ("reference",):
            for name, supports, function in self._fast:
                if (not allowed or name in allowed) and supports(*args, **kwargs):
                    return function(*args, **kwargs)
        return self.reference(*args, **kwargs)


def operation(reference: Callable[Arguments, Result]) -> Operation[Arguments, Result]:
    """Makes an operation of its reference."""
    return Operation(reference)


def allows(name: str) -> bool:
    """Whether the environment variable lets backend `name` be used."""
    allowed = _allowed(os.environ.get(PIN, ""))
    return not allowed or name in allowed


@contextmanager
def pinned(names: str) -> Iterator[None]:
    """Inside, only these backends are used, as `FTKIT_KERNELS` would have it."""
    before = os.environ.get(PIN)
    os.environ[PIN] = names
    try:
        yield
    finally:
        if before is None:
            del os.environ[PIN]
        else:
            os.environ[PIN] = before


def backends() -> dict[str, list[str]]:
    """Operation → its backends in the order in which they are tried, as `ftkit doctor` shows them."""
    return {name: getattr(plugins.load("kernels", name), name).backends for name in plugins.names("kernels")}


@functools.cache
def _allowed(pin: str) -> tuple[str, ...]:
    """The backends that the environment variable's value names; empty: all. Raises InputError for unknown ones."""
    allowed = tuple(name.strip() for name in pin.split(",") if name.strip())
    if any(name not in _backends for name in allowed):
        for name in plugins.names("kernels"):
            plugins.load("kernels", name)
    for name in allowed:
        if name not in _backends:
            raise InputError(f"{PIN}: expected names of backends, got {name!r}", did_you_mean(name, _backends))
    return allowed
