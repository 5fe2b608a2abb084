"""The training loop, checkpoints, events and the watchdog.

`run(config)` does everything that `ftkit train` does:

    from ftkit import train
    from ftkit.config import DataConfig, ModelConfig, RunConfig

    config = RunConfig(model=ModelConfig(source="model.gguf"), data=DataConfig(path="chats.jsonl"))
    result = train.run(config, report=print)
"""

from collections.abc import Callable
from typing import Any

from ftkit.config import RunConfig
from ftkit.train import heap
from ftkit.train.result import TrainResult
from ftkit.train.resume import resumed_config

__all__ = ["TrainResult", "resumed_config", "run"]


def run(
    config: RunConfig,
    report: Callable[[dict[str, Any]], None] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainResult:
    """Trains as the configuration says, and leaves a run directory; `report` hears every event.

    Raises InputError for what the configuration, the data or the disk do not allow, Interrupted after SIGINT or
    SIGTERM, FtkitError when the watchdog gives up. Whatever is raised, nothing is half-written.
    """
    heap.settle()
    from ftkit.train.start import start  # torch is imported when something is trained

    return start(config, report, resume=resume, overwrite=overwrite)
