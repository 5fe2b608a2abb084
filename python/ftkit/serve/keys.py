"""The file of API keys: names and hashes, never the keys themselves.

[[keys]]
name = "alice"
hash = "blake3:…"            # what `ftkit keys` prints
admin = false                # may manage adapters, files and jobs, and read the metrics
models = ["support"]         # that it may ask for; all when not given
requests_per_minute = 60
tokens_per_minute = 20000    # of prompts and answers

A server looks at the file every second and takes it over when it has changed; what is wrong then is told on standard
error, and the keys stay as they were.
"""

import json
import os
import re
import secrets
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit import _core
from ftkit.errors import InputError, did_you_mean

_KINDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "hash": str,
    "admin": bool,
    "models": list,
    "requests_per_minute": (int, float),
    "tokens_per_minute": (int, float),
}
_HASH = re.compile(r"blake3:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def read(path: Path) -> str:
    """The keys of a file, as JSON for the core. Raises InputError with everything that is wrong."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a TOML file of keys, got: {str(error).lower()}") from None
    keys = table.get("keys")
    if set(table) - {"keys"} or not isinstance(keys, list) or not keys:
        raise InputError(f"{path}: expected [[keys]] with name and hash each, got none", "`ftkit keys NAME` makes one")
    problems = [problem for number, key in enumerate(keys, 1) for problem in _problems(number, key)]
    for field in ("name", "hash"):
        values = [key.get(field) for key in keys if isinstance(key, dict)]
        problems += [
            f"{field}: expected each once, got {value!r} twice" for value in set(values) if values.count(value) > 1
        ]
    if problems:
        raise InputError(f"{path}: expected keys, got\n  " + "\n  ".join(problems))
    return json.dumps(keys)


def fresh(name: str, **limits: Any) -> tuple[str, str]:
    """A new key, and the lines of a file of keys that know it."""
    if not _NAME.fullmatch(name):
        raise InputError(f"name: expected 1 to 64 letters, digits, '.', '_', '-', got {name!r}")
    key = f"ftk-{secrets.token_urlsafe(32)}"
    given = {"name": name, "hash": _core.hashed_key(key)} | {key: value for key, value in limits.items() if value}
    return key, "[[keys]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items())


def append(path: Path, lines: str) -> None:
    """Adds a key's lines to a file, which only its owner may read. Raises InputError when it is no file of keys."""
    before = ""
    if path.exists():
        read(path)
        before = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n"
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(before + lines)
        read(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Watch:
    """Reads a file of keys anew whenever it has changed."""

    def __init__(self, path: Path, take: Callable[[str], None], *, seconds: float = 1.0) -> None:
        """`take` gets the keys of each new state of the file, as `read` gives them; it is looked at every `seconds`."""
        self._path, self._take, self._seconds = path, take, seconds
        self._seen = self._state()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ftkit-keys", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Looks no more."""
        self._ended.set()
        self._thread.join()

    def _state(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino)

    def _work(self) -> None:
        while not self._ended.wait(self._seconds):
            state = self._state()
            if state == self._seen:
                continue
            self._seen = state
            try:
                self._take(read(self._path))
            except InputError as error:
                print(f"warning: {error.message}; the keys stay as they were", file=sys.stderr, flush=True)
            else:
                print(f"keys: read anew from {self._path}", file=sys.stderr, flush=True)


def _problems(number: int, key: object) -> list[str]:
    if not isinstance(key, dict):
        return [f"key {number}: expected a table, got another"]
    where = f"key {number}"
    found = [
        f"{where}: unknown key {name!r} ({did_you_mean(name, _KINDS) or ''})" for name in key if name not in _KINDS
    ]
    for name, kind in _KINDS.items():
        value = key.get(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            found.append(f"{where}: {name}: expected another type, got {value!r}")
    if not isinstance(key.get("name"), str) or not _NAME.fullmatch(key["name"]):
        found.append(f"{where}: name: expected 1 to 64 letters, digits, '.', '_', '-', got {key.get('name')!r}")
    if not isinstance(key.get("hash"), str) or not _HASH.fullmatch(key["hash"]):
        found.append(f"{where}: hash: expected blake3: and 64 hexadecimal digits; the key itself is never written down")
    for name in ("requests_per_minute", "tokens_per_minute"):
        value = key.get(name)
        if isinstance(value, int | float) and not 1 <= value <= 1e12:
            found.append(f"{where}: {name}: expected at least 1, got {value}")
    if isinstance(key.get("models"), list) and not all(isinstance(name, str) for name in key["models"]):
        found.append(f"{where}: models: expected names, got another")
    return found
