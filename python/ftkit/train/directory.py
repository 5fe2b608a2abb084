"""The run directory `runs/NAME/`: where everything a run makes lies, and which runs there are.

config.toml     the configuration, fully resolved       lock.json      versions and hashes of what went in
events.jsonl    what happened                            report.html    the same for people
checkpoints/step-000100/                                 adapter/       the result: PEFT format + ftkit.json
result.json     what `train` returned, once it is done
sparse-tokens/  predictors, where training.sparse_tokens leaves something out
"""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    def sparse_tokens(self) -> Path:
        """The predictors that decide which tokens layers leave out, where the run has any."""
        return self.path / "sparse-tokens"

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
    """All runs of a directory, the oldest first. Raises InputError for what is no directory."""
    if Path(runs_dir).exists() and not Path(runs_dir).is_dir():
        raise InputError(f"{runs_dir}: expected a directory of runs, got a file")
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


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with the paths of model and data written out, so that it holds from everywhere."""

    def absolute(path: str) -> str:
        if path.startswith("feedback:"):
            from ftkit.data import feedback  # which brings torch along

            return feedback.absolute(path)
        return os.path.abspath(path) if path != "-" and os.path.exists(path) else path

    def each(paths: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return absolute(paths) if isinstance(paths, str) else tuple(map(absolute, paths))

    held_out = config.evaluation
    if held_out.path is not None:
        held_out = dataclasses.replace(held_out, path=each(held_out.path))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, source=absolute(config.model.source)),
        data=dataclasses.replace(config.data, path=each(config.data.path)),
        evaluation=held_out,
    )


def expected(config: RunConfig, *, resume: bool, overwrite: bool) -> RunDirectory:
    """Where the run will be, once it is clear that it may: nothing is written yet.

    Raises InputError when a run is there that should not be, or none that should, or the place refuses.
    """
    assert config.output.name is not None
    runs_dir, name = config.output.runs_dir, config.output.name
    if resume:
        return existing(runs_dir, name)
    run = named(runs_dir, name)
    with files.disk_errors(run.path):
        taken = run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir()))
    if taken and not overwrite:
        raise InputError(
            f"{run.path}: expected no such run, got one that exists",
            "--resume continues it, --overwrite replaces it, --name gives this one another name",
        )
    if taken and not run.config.is_file():
        raise InputError(f"{run.path}: expected a run to overwrite, got something that is not ours to delete")
    above = next(path for path in (run.path, *run.path.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        kind = "a file" if above.is_file() else "one without the right to write"
        raise InputError(f"{run.path}: expected {above} to be a directory to write to, got {kind}", "see --runs-dir")
    return run


def create(run: RunDirectory, config: RunConfig) -> None:
    """An empty run directory with the resolved configuration in it, in place of what was there."""
    if run.config.exists():
        with claim(run):
            pass
    with files.disk_errors(run.path):
        if run.path.exists():
            shutil.rmtree(run.path)
        run.checkpoints.mkdir(parents=True)
    try:
        files.write_text(run.config, config.to_toml())
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


@contextmanager
def claim(run: RunDirectory) -> Iterator[None]:
    """Keeps other processes from training the same run; ends with the process, however it ends.

    Raises InputError when another has it.
    """
    with files.disk_errors(run.path):
        file = (run.path / ".claim").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run.path}: expected a run that nobody is training, got one that another process has"
            ) from None
        yield
