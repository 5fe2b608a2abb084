"""Plugins are files: the file's name is its registration, its first docstring line its entry in `ftkit list`.

A room is a package such as `ftkit.adapters`; every module in it whose name does not start with an underscore is a
plugin, and adding one is adding a file. Descriptions are read without importing anything.
"""

import ast
import importlib
from pathlib import Path
from types import ModuleType

from ftkit.errors import InputError, did_you_mean


def names(room: str) -> list[str]:
    """The plugins of `room` (a name below `ftkit`, such as `adapters` or `engine.decode`), sorted."""
    return sorted(path.stem for path in _folder(room).glob("*.py") if not path.stem.startswith("_"))


def describe(room: str, name: str) -> str:
    """The first line of the plugin's docstring."""
    tree = ast.parse((_folder(room) / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def load(room: str, name: str) -> ModuleType:
    """The plugin's module. Raises InputError, with the nearest known name, when there is none."""
    known = names(room)
    if name not in known:
        raise InputError(f"{room}: expected one of its {len(known)} names, got {name!r}", did_you_mean(name, known))
    return importlib.import_module(f"ftkit.{room}.{name}")


def _folder(room: str) -> Path:
    return Path(__file__).parent.joinpath(*room.split("."))
