"""trackio: keeps numbers in a local database that its dashboard shows."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit.train.loggers import session

PACKAGE = "trackio"


def open(run: str, folder: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:  # noqa: ARG001
    """A listener that logs scalars under the project `ftkit`."""
    return session(importlib.import_module(PACKAGE), run, config)
