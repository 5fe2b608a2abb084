"""From a configuration to a result: puts a run together, anew or from its last checkpoint, runs it, and closes it."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit.config import RunConfig
from ftkit.errors import FtkitError, InputError, Interrupted
from ftkit.train import (
    checkpoint,
    checkpoints,
    directory,
    files,
    loggers,
    memory,
    processes,
    report,
    samples,
    session,
    sharding,
)
from ftkit.train import lock as locks
from ftkit.train.directory import RunDirectory
from ftkit.train.events import Events, rewind
from ftkit.train.loop import Loop
from ftkit.train.result import TrainResult, sha256_of
from ftkit.train.session import Session
from ftkit.train.signals import DEAF_SECONDS, Interruption

_ONCE_SECONDS = 2.0
"""In which torchrun passes a signal on."""

Listener = Callable[[dict[str, Any]], None]


def start(config: RunConfig, listener: Listener | None, *, resume: bool, overwrite: bool) -> TrainResult:
    """See `ftkit.train.run`."""
    many = processes.launched() > 1
    with Interruption(_ONCE_SECONDS if many else 0.0, DEAF_SECONDS if many else None) as stop:
        try:
            mine = processes.join()
            heard = listener if mine.first else None
            with mine.together():
                return _start(config, heard, stop, mine, resume=resume, overwrite=overwrite)
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped at once; the last checkpoint is whole", "continue with ftkit train --resume"
            ) from None


def _start(
    config: RunConfig,
    listener: Listener | None,
    stop: Interruption,
    mine: processes.Processes,
    *,
    resume: bool,
    overwrite: bool,
) -> TrainResult:
    mine = dataclasses.replace(mine, sharded=sharding.shares(config) > 1)
    mine.check(config)
    if config.output.name is None:
        name = mine.exchange(directory.fresh_name(config))[0]
        config = dataclasses.replace(config, output=dataclasses.replace(config.output, name=name))
    config = directory.with_absolute_paths(config).resolved()
    run = mine.one_after_the_first(lambda: directory.expected(config, resume=resume, overwrite=overwrite))
    loggers.check(config.output.loggers)

    def while_reading(rows: int) -> None:
        if stop.requested:
            raise Interrupted("interrupted while the data was read; nothing was written")
        if listener is not None:
            listener({"event": "reading", "step": 0, "rows": rows})

    made = session.build(config, while_reading, mine)
    if stop.requested:
        raise Interrupted("interrupted before the first step; nothing was written")
    if not resume and mine.first:
        directory.create(run, config)
    with directory.claim(run) if mine.first else contextlib.nullcontext():
        progress, losses, notices = _resume(run, made) if resume else (checkpoint.Progress(), [], [])
        mine.exchange(None)  # all have read what the first is about to write
        others = []
        if mine.first:
            files.write_text(run.config, config.to_toml())
            locks.write(run.lock, made.lock)
            others = loggers.open_all(config.output.loggers, run.name, run.path, config.table())
        events = Events(run.events if mine.first else None, [*([listener] if listener else []), *others])
        kind = "resumed" if progress.step else "started"
        try:
            told = {"run": run.name, "steps": made.steps, "summary": made.summary()}
            events.emit(kind, progress.step, **told, seconds_left=made.seconds_left(progress.step))
            for notice in [*notices, *made.notices]:
                events.emit("notice", progress.step, message=notice)
            for notice in mine.one_after_the_first(lambda: made.learn_sparse_tokens(run, progress.step)):
                events.emit("notice", progress.step, message=notice)
            asked = made.examples() if mine.first else []
            if progress.step == 0:
                _sample(made, asked, events, 0, None)
            loop = Loop(made, run, progress, events, losses, stop)
            with mine.together():
                loop.train()
            result = mine.exchange(_finish(loop, run) if mine.first else None)[0]
            assert result is not None
            _sample(made, asked, events, progress.step, run.adapter)
            events.emit("finished", progress.step, **result.table())
        except BaseException as error:
            with contextlib.suppress(FtkitError):  # what is already going wrong is what people should read
                if not isinstance(error, Interrupted):
                    events.emit("failed", progress.step, message=str(error) or type(error).__name__)
                if mine.first:
                    report.write(run)
            raise
        finally:
            with contextlib.suppress(FtkitError):
                events.close()
        if mine.first:
            report.write(run)
    return result


def _resume(run: RunDirectory, made: Session) -> tuple[checkpoint.Progress, list[float], list[str]]:
    """Fills the session from the last checkpoint; (progress, losses before it, what people should know)."""
    before = locks.read(run.lock) if run.lock.exists() else made.lock  # killed before it was written: nothing was done
    inputs, surroundings = locks.differences(before, made.lock)
    if inputs:
        raise InputError(
            f"{run.path}: expected what the run began with, got something else: {'; '.join(inputs)}",
            "start a new run with another --name, or give back what it began with",
        )
    notices = [
        f"resumed with another {difference}; bits may differ from those of a run that was never interrupted"
        for difference in surroundings
    ]
    if made.processes.first:
        files.sweep(run.path)
    found = checkpoints.every(run.checkpoints)
    progress = checkpoint.load(found[-1], made.parameters, made.optimizer) if found else checkpoint.Progress()
    if progress.step >= made.steps:
        raise InputError(
            f"{run.path}: expected a run with steps left, got one that has done {progress.step} of {made.steps}",
            "--max-steps with a higher number continues it",
        )
    if not made.processes.first:
        return progress, [], []
    run.result.unlink(missing_ok=True)
    kept = rewind(run.events, progress.step)
    losses = [event["loss"] for event in kept if event["event"] == "step" and event.get("loss") is not None]
    return progress, losses, notices


def _sample(made: Session, asked: list[samples.Example], events: Events, step: int, adapter: Path | None) -> None:
    """Tells how the examples are answered, by the base model or under the adapter."""
    if not asked:
        return
    for number, (example, text) in enumerate(zip(asked, samples.answers(made.loaded, asked, adapter), strict=True)):
        moment = "before" if adapter is None else "after"
        told = {"prompt": example.question, "expected": example.expected, "answer": text}
        events.emit("sample", step, number=number, moment=moment, **told)
    made.loaded.model.train()


def _finish(loop: Loop, run: RunDirectory) -> TrainResult:
    """Puts the result in place: the best checkpoint's adapter, or the last when nothing was held out."""
    made, progress = loop.session, loop.progress
    best = progress.best_step if progress.best_step is not None else progress.step
    source = run.checkpoints / f"step-{best:06d}" / "adapter"
    with files.new_directory(run.adapter) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
    result = TrainResult(
        run=run.name,
        adapter=str(run.adapter),
        adapter_sha256=sha256_of(run.adapter),
        steps=progress.step,
        final_loss=progress.loss,
        eval_loss=progress.best_loss,
        real_tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        peak_bytes=progress.peak_bytes,
        planned_peak_bytes=made.plan.peak_bytes,
        peak_rss_bytes=memory.peak_rss_bytes(),
        planned_peak_rss_bytes=made.plan.peak_rss_bytes,
        seconds=progress.seconds,
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        bad_steps=progress.bad_steps,
        report=str(run.report),
    )
    files.write_text(run.result, json.dumps(result.table(), indent=2) + "\n")
    return result
