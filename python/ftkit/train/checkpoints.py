"""The folder of checkpoints: which there are, and which may go."""

import shutil
from pathlib import Path


def every(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, the oldest step first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / "state.json").is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint by its name."""
    return int(path.name[5:])


def prune(folder: Path, keep: int, best_step: int | None) -> list[Path]:
    """Removes all but the `keep` newest checkpoints (0: none is removed) and the best; those removed."""
    removed = [path for path in every(folder)[:-keep] if step_of(path) != best_step] if keep else []
    for path in removed:
        remove(path)
    return removed


def remove(path: Path) -> None:
    """Removes a checkpoint; one that is half gone is no longer seen as one."""
    (path / "state.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
