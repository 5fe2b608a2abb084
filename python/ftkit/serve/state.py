"""The state directory: one server's, claimed while it runs; ids that become paths are checked here and nowhere else."""

import fcntl
import json
import re
import secrets
from pathlib import Path
from typing import IO, Any

from ftkit.errors import InputError
from ftkit.serve.refused import conflict, missing
from ftkit.train import files

_ID = re.compile(r"(file|ftjob)-[0-9a-f]{24}")


class State:
    """The directory that a server keeps everything in; made when something is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim: IO[str] | None = None

    def claim(self) -> None:
        """Keeps other servers out. Raises InputError when another has it."""
        if self._claim is not None:
            return
        with files.disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = (self.path / ".claim").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(
                f"{self.path}: expected a state directory that no server uses, got one that another has",
                "give this one another with --state-dir",
            ) from None
        self._claim = file
        for room in ("files", "adapters", "jobs"):
            if (self.path / room).is_dir():
                files.sweep(self.path / room)

    def room(self, name: str) -> Path:
        """The folder of this name, made if it is missing. Raises Refused when another server has the directory."""
        try:
            self.claim()
        except InputError as error:
            raise conflict(error.message) from None
        folder = self.path / name
        with files.disk_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def found(self, room: str) -> list[Path]:
        """What lies in a folder, by id."""
        folder = self.path / room
        return sorted(path for path in folder.glob("*") if _ID.fullmatch(path.name)) if folder.is_dir() else []

    def place(self, room: str, kind: str, name: str) -> Path:
        """Where the thing of this id lies. Raises Refused (404) for what is no id, or is not there."""
        if not _ID.fullmatch(name) or not name.startswith(f"{kind}-") or not (self.path / room / name).is_dir():
            raise missing(f"the id of a {'file' if kind == 'file' else 'job'}", name)
        return self.path / room / name

    def close(self) -> None:
        """Lets other servers in."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None


def fresh(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}-{secrets.token_hex(12)}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of our own files. Raises InputError when it is damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a file of this server, got: {str(error).lower()}") from None
    if not isinstance(table, dict):
        raise InputError(f"{path}: expected an object, got {type(table).__name__}")
    return table


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Replaces one of our own files, whole."""
    files.write_text(path, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
