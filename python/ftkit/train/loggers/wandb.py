"""Weights & Biases: sends numbers to your account there, or keeps them with WANDB_MODE=offline."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit.train.loggers import session

PACKAGE = "wandb"


def open(run: str, folder: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A listener that logs scalars under the project `ftkit`."""
    return session(importlib.import_module(PACKAGE), run, config, dir=str(folder))
