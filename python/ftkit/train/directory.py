"""The run directory `runs/NAME/`: where everything a run makes lies, and which runs there are.

config.toml     the configuration, fully resolved       lock.json      versions and hashes of what went in
events.jsonl    what happened                            report.html    the same for people
checkpoints/step-000100/                                 adapter/       the result: PEFT format + ftkit.json
result.json     what `train` returned, once it is done
"""

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.config import RunConfig
from ftkit.errors import InputError, did_you_mean
from ftkit.train import files

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def lock(self) -> Path:
        """What the run was made of."""
        return self.path / "lock.json"

    @property
    def events(self) -> Path:
        """What happened."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    @property
    def result(self) -> Path:
        """What `train` returned."""
        return self.path / "result.json"

    def finished(self) -> dict[str, Any] | None:
        """The result of a run that came to its end, else None."""
        try:
            found = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


def named(runs_dir: str | Path, name: str) -> RunDirectory:
    """The directory of a run by name, whether it exists or not. Raises InputError for what cannot be a name."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"output.name: expected up to 100 letters, digits, '.', '_', '-', a letter or digit first, got {name!r}"
        )
    return RunDirectory(path=Path(runs_dir) / name)


def existing(runs_dir: str | Path, name: str) -> RunDirectory:
    """A run that is there. Raises InputError, with the nearest name, for one that is not."""
    run = named(runs_dir, name)
    if not run.config.is_file():
        known = [other.name for other in every(runs_dir)]
        raise InputError(f"{run.path}: expected a run, got none", did_you_mean(name, known))
    return run


def every(runs_dir: str | Path) -> list[RunDirectory]:
    """All runs of a directory, the oldest first."""
    found = [RunDirectory(path=path.parent) for path in Path(runs_dir).glob("*/config.toml")]
    return sorted(found, key=lambda run: (run.config.stat().st_mtime, run.name))


def fresh_name(config: RunConfig) -> str:
    """A name from model, data and time that no run has yet."""
    data = config.data.path if isinstance(config.data.path, str) else next(iter(config.data.path), "data")
    parts = [Path(config.model.source).name.removesuffix(".gguf"), Path(data).stem]
    slug = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", part).strip("-").lower()[:30] for part in parts).strip("-")
    name = f"{slug or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = {path.name for path in Path(config.output.runs_dir).glob(f"{name}*")}
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def create(config: RunConfig, *, overwrite: bool) -> RunDirectory:
    """An empty run directory with the resolved configuration in it.

    Raises InputError when the run exists and must not be overwritten, or when the place cannot be written to.
    """
    assert config.output.name is not None
    run = named(config.output.runs_dir, config.output.name)
    if run.path.exists() and any(run.path.iterdir() if run.path.is_dir() else [run.path]):
        if not overwrite:
            raise InputError(
                f"{run.path}: expected no such run, got one that exists",
                "--resume continues it, --overwrite replaces it, --name gives this one another name",
            )
        if not run.config.is_file():
            raise InputError(f"{run.path}: expected a run to overwrite, got something else that is not ours to delete")
        with files.disk_errors(run.path):
            shutil.rmtree(run.path)
    with files.disk_errors(run.path):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    files.write_text(run.config, config.to_toml())
    return run
