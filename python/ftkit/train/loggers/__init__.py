"""Where events go besides events.jsonl: one file a service, imported only when `output.loggers` asks for it.

A plugin has `open(run: str, folder: Path, config: dict) -> Callable[[Event], None]`; the returned function hears
every event of the run, `finished` and `interrupted` last.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftkit import plugins
from ftkit.errors import InputError

METRICS = {"step": ("loss", "learning_rate", "gradient_norm", "tokens_per_second"), "evaluation": ("loss",)}


def check(names: Sequence[str]) -> None:
    """Raises InputError for a service that is unknown or not installed."""
    for name in names:
        package: str = plugins.load("train.loggers", name).PACKAGE
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"output.loggers: expected the package {package!r} to be installed for {name!r}, got none",
                f"uv pip install {package}",
            )


def open_all(names: Sequence[str], run: str, folder: Path, config: dict[str, Any]) -> list[Callable[[Any], None]]:
    """The listeners of the named services."""
    return [plugins.load("train.loggers", name).open(run, folder, config) for name in names]


def session(service: Any, run: str, config: dict[str, Any], **settings: Any) -> Callable[[dict[str, Any]], None]:
    """A listener that logs scalars by `service`'s init, log and finish, under the project `ftkit`."""
    service.init(project="ftkit", name=run, config=config, **settings)

    def listen(event: dict[str, Any]) -> None:
        values = metrics(event)
        if values:
            service.log(values, step=event["step"])
        if event["event"] in ("finished", "interrupted"):
            service.finish()

    return listen


def metrics(event: dict[str, Any]) -> dict[str, float]:
    """The event's numbers by the names services show them under, such as `train/loss`; empty for other events."""
    group = "train" if event["event"] == "step" else "evaluation"
    known = METRICS.get(event["event"], ())
    values = {name: event.get(name) for name in known} | (event.get("metrics", {}) if known else {})
    return {f"{group}/{name}": value for name, value in values.items() if value is not None}
