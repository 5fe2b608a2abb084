"""Which run `--resume` means, and what of its configuration may change on the way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftkit.config import RunConfig, toml
from ftkit.errors import InputError
from ftkit.train import directory
from ftkit.train.history import flat

# The rest decides what is learned: another value is another run.
MAY_CHANGE = {
    "evaluation.every_steps",
    "evaluation.patience",
    "model.device",
    "training.activation_checkpointing",
    "training.budget",
    "training.epochs",
    "training.max_steps",
    "training.shard",
    "training.stop_after_bad_steps",
    "training.threads",
}


def resumed_config(path: str | Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """The configuration of the run to continue, with changes; without a name it is the newest unfinished run.

    A file at `path` counts as changes. Raises InputError for a change that would make it another run.
    """
    given = flat(toml.read_file(Path(path))[0]) if path is not None else {}
    given |= overrides
    runs_dir = given.get("output.runs_dir", "runs")
    name = given.get("output.name") or _newest_unfinished(runs_dir)
    run = directory.existing(runs_dir, name)
    stored = RunConfig.from_toml(run.config)
    config = directory.with_absolute_paths(
        RunConfig.from_toml(run.config, given | {"output.name": name, "output.runs_dir": str(runs_dir)})
    )
    was, wanted = flat(stored.table()), flat(config.table())
    changed = [
        f"{key}: was {was.get(key)!r}, is {wanted.get(key)!r}"
        for key in sorted({*was, *wanted})
        if was.get(key) != wanted.get(key) and key not in MAY_CHANGE and not key.startswith("output.")
    ]
    if changed:
        raise InputError(
            f"{run.path}: expected the configuration that the run began with, got another: {'; '.join(changed)}",
            "start a new run with another --name",
        )
    return config


def _newest_unfinished(runs_dir: str) -> str:
    unfinished = [run for run in directory.every(runs_dir) if run.finished() is None]
    if not unfinished:
        raise InputError(f"{runs_dir}: expected an unfinished run to resume, got none", "name a run with --name")
    return unfinished[-1].name
