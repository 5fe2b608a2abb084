"""Weights & Biases: sends numbers to your account there, or keeps them with WANDB_MODE=offline."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit.train.loggers import metrics

PACKAGE = "wandb"


def open(run: str, folder: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A listener that logs scalars under the project `ftkit`."""
    service: Any = importlib.import_module(PACKAGE)
    service.init(project="ftkit", name=run, config=config, dir=str(folder))

    def listen(event: dict[str, Any]) -> None:
        values = metrics(event)
        if values:
            service.log(values, step=event["step"])
        if event["event"] in ("finished", "interrupted"):
            service.finish()

    return listen
