"""What there is to say about runs that are on disk: a line each, side by side, and what may be removed."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftkit.config import toml
from ftkit.errors import InputError
from ftkit.train import checkpoints, events
from ftkit.train.directory import RunDirectory


def summary(run: RunDirectory) -> dict[str, Any]:
    """A run in one line: what it is made of, how far it came, its losses and size.

    Keys: `run state started steps of_steps loss eval_loss model data method checkpoints bytes`; `state` is one of
    finished, interrupted, failed, unfinished, or damaged when its configuration cannot be read.
    """
    try:
        table, _ = toml.read_file(run.config)
    except InputError:  # one such run must not hide the others
        table = None
    found = events.read(run.events)
    steps = [event for event in found if event["event"] == "step"]
    losses = [event["loss"] for event in steps if event.get("loss") is not None]
    evaluations = [event["loss"] for event in found if event["event"] == "evaluation" and event.get("loss") is not None]
    started = next((event for event in found if event["event"] == "started"), {})
    return {
        "run": run.name,
        "state": "damaged" if table is None else _state(found),
        "started": started.get("time", run.config.stat().st_mtime),
        "steps": steps[-1]["step"] if steps else 0,
        "of_steps": started.get("steps"),
        "loss": losses[-1] if losses else None,
        "eval_loss": min(evaluations, default=None),
        "model": (table or {}).get("model", {}).get("source"),
        "data": (table or {}).get("data", {}).get("path"),
        "method": (table or {}).get("method", {}).get("name"),
        "checkpoints": len(checkpoints.every(run.checkpoints)),
        "bytes": sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()),
    }


def settings_that_differ(runs: Sequence[RunDirectory]) -> dict[str, list[Any]]:
    """Every key of the configurations on which the runs do not agree, with its value in each (None: absent)."""
    tables = [flat(toml.read_file(run.config)[0]) for run in runs]
    keys = sorted(set().union(*tables) - {"output.name"})
    values = {key: [table.get(key) for table in tables] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def prune(runs: Sequence[RunDirectory], keep: int) -> tuple[list[Path], int]:
    """Removes the checkpoints of finished runs, but for the `keep` newest; (what was removed, its bytes).

    A run that did not finish keeps its checkpoints: they are how it continues. Raises InputError for a negative `keep`.
    """
    if keep < 0:
        raise InputError(f"--keep: expected 0 or more, got {keep}")
    removed, freed = [], 0
    for run in runs:
        if run.finished() is None:
            continue
        for path in checkpoints.every(run.checkpoints)[: -keep or None]:
            freed += sum(inside.stat().st_size for inside in path.rglob("*") if inside.is_file())
            checkpoints.remove(path)
            removed.append(path)
    return removed, freed


def age(started: float) -> str:
    """When a run started, in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(started))


def _state(found: Sequence[events.Event]) -> str:
    ends = ("finished", "interrupted", "failed")
    last = next((event["event"] for event in reversed(found) if event["event"] in (*ends, "started", "resumed")), "")
    return last if last in ends else "unfinished"


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
