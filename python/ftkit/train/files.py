"""Files that appear whole or not at all: written under a temporary name, synced to the disk, then renamed.

A reader, a crash, a kill or a full disk at any moment finds the old file or the new one. Temporary names start with
`.tmp-`; what a killed process left of them, `sweep` removes.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ftkit.errors import FtkitError, InputError

_PREFIX = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def write_text(path: Path, text: str) -> None:
    """Writes or replaces one file. Raises InputError when the place is full or refuses."""
    with disk_errors(path):
        temporary = path.parent / f"{_PREFIX}{os.getpid()}-{path.name}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to fill, which becomes `path` at the end; nothing stays of it when the filling fails.

    A directory that was at `path` is replaced. Raises InputError when the place is full or refuses.
    """
    with disk_errors(path):
        temporary = path.parent / f"{_PREFIX}{os.getpid()}-{path.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for inside in [*temporary.rglob("*"), temporary]:
                _sync(inside)
            old = path.parent / f"{_PREFIX}{os.getpid()}-old-{path.name}"
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed processes left half-written in `folder` and one level below."""
    for left in [*folder.glob(f"{_PREFIX}*"), *folder.glob(f"*/{_PREFIX}*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the system says about a full or forbidden place into words about `path`."""
    try:
        yield
    except OSError as error:
        raise _in_words(path, error.errno, error) from error
    except SafetensorError as error:  # which has the number in its text only
        number = re.search(r"os error (\d+)", str(error))
        raise _in_words(path, int(number[1]) if number else None, error) from error


def _in_words(path: Path, number: int | None, error: Exception) -> FtkitError:
    if number in _FULL:
        return InputError(
            f"{path}: expected room for this file, got: {os.strerror(number or 0).lower()}",
            "everything written before is whole; make room and try again, a run with --resume",
        )
    if number in _REFUSED:
        return InputError(f"{path}: expected a place that can be written to, got: {os.strerror(number or 0).lower()}")
    return FtkitError(f"{path}: {str(error).lower()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
