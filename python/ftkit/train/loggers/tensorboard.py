"""TensorBoard: writes event files into the run's directory, `tensorboard --logdir runs` shows them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit.train.loggers import metrics

PACKAGE = "tensorboard"


def open(run: str, folder: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:  # noqa: ARG001
    """A listener that writes scalars."""
    tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(str(folder / "tensorboard"))

    def listen(event: dict[str, Any]) -> None:
        for name, value in metrics(event).items():
            writer.add_scalar(name, value, event["step"])
        if event["event"] in ("finished", "interrupted"):
            writer.close()

    return listen
