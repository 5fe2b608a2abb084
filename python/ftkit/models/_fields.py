"""Reads configuration tables of models: typed values, with the key and both values in the error."""

import math
import struct
from collections.abc import Mapping
from typing import Any

from ftkit.errors import InputError

_MISSING = object()


def integer(
    table: Mapping[str, Any], key: str, default: Any = _MISSING, at_least: int = 1, at_most: int = 2**31 - 1
) -> int:
    """A whole number under `key`. A missing or null key gives the default, or InputError without one."""
    value = _value(table, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise InputError(f"{key}: expected a whole number, at least {at_least} and at most {at_most}, got {value!r}")
    return value


def number(table: Mapping[str, Any], key: str, default: Any = _MISSING) -> float:
    """A positive, finite number under `key`."""
    value = _value(table, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise InputError(f"{key}: expected a positive number, got {value!r}")
    return float(value)


def single(table: Mapping[str, Any], key: str, default: Any = _MISSING) -> float:
    """A number that was stored as float32: the shortest decimal that rounds to it (1e-05, not 9.9999997e-06)."""
    value = number(table, key, default)
    for digits in range(1, 18):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", value):
            return short
    return value


def boolean(table: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false under `key`."""
    value = _value(table, key, default)
    if not isinstance(value, bool):
        raise InputError(f"{key}: expected true or false, got {value!r}")
    return value


def one_of(table: Mapping[str, Any], key: str, default: str, allowed: tuple[str, ...]) -> str:
    """A text under `key`, one of `allowed`."""
    value = _value(table, key, default)
    if value not in allowed:
        raise InputError(f"{key}: expected one of {', '.join(allowed)}, got {value!r}")
    return str(value)


def _value(table: Mapping[str, Any], key: str, default: Any) -> Any:
    value = table.get(key)
    if value is None:
        if default is _MISSING:
            raise InputError(f"{key}: expected a value, got none")
        return default
    return value
