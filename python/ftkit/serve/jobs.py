"""Fine-tuning jobs: one trains at a time, in a process of its own, while nobody asks anything.

A job's record says what is to be done, its run directory how far it is; a server that finds a job that was not ended
goes on with it from its last checkpoint.
"""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ftkit.engine import Engine
from ftkit.errors import FtkitError
from ftkit.serve.adapters import Adapters
from ftkit.serve.fields import page
from ftkit.serve.files import Files
from ftkit.serve.job import KINDS, UNDER_WAY, Job, asked
from ftkit.serve.refused import Refused, conflict, missing
from ftkit.serve.state import State, fresh, write_json
from ftkit.serve.training import Training
from ftkit.train import files as disk

_MOST_WAITING = 100


class Jobs:
    """The jobs of a state directory. For several threads."""

    def __init__(self, engine: Engine, state: State, files: Files, adapters: Adapters, *, quant: str) -> None:
        """`quant`: how a job holds the base's matrices."""
        self._engine, self._state, self._files, self._adapters, self._quant = engine, state, files, adapters, quant
        self._change = threading.Condition(threading.RLock())
        self._jobs = {path.name: self._opened(path) for path in state.found("jobs")}
        self._closing = False
        self._under_hand: Job | None = None
        self._thread: threading.Thread | None = None
        self.paused_for_requests = 0
        """How often a request made training wait."""

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Takes a job in; it begins when those before it have ended."""
        record = asked(body, self._engine.name)
        rows = {"training.jsonl": self._rows(record["training_file"], record["method"], "training_file")}
        if record["validation_file"] is not None:
            rows["validation.jsonl"] = self._rows(record["validation_file"], record["method"], "validation_file")
        with self._change:
            if sum(job.status in UNDER_WAY for job in self._jobs.values()) >= _MOST_WAITING:
                raise Refused(f"expected at most {_MOST_WAITING} jobs under way, got one more", status=429)
            place = self._state.room("jobs") / fresh("ftjob")
            with disk.new_directory(place) as folder:
                for name, path in rows.items():
                    os.link(path, folder / name)  # the file may be deleted meanwhile
                write_json(folder / "job.json", record)
            job = self._jobs[place.name] = self._opened(place)
            job.told(f"Created fine-tuning job: {job.id}")
            self._begin()
            self._change.notify_all()
            return job.shown()

    def every(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The jobs, newest first."""
        with self._change:
            jobs = sorted(self._jobs.values(), key=lambda job: (job.record["created_at"], job.id), reverse=True)
            return page([job.shown() for job in jobs], query)

    def retrieve(self, name: str) -> dict[str, Any]:
        """One of them."""
        with self._change:
            return self._there(name).shown()

    def events(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        """What happened in it, newest first."""
        with self._change:
            return page(self._there(name).events(), query)

    def checkpoints(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        """Its checkpoints, newest first."""
        with self._change:
            return page(self._there(name).checkpoints(), {"limit": "10"} | dict(query))

    def checkpoint(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The adapter of a checkpoint, and where it comes from. Raises Refused for what is none."""
        kind, _, rest = name.partition("-")
        digits, _, step = rest.partition("-")
        with self._change:
            job = self._jobs.get(f"ftjob-{digits}")
            known = [] if job is None else job.checkpoints()
        if kind != "ftckpt" or job is None or all(checkpoint["id"] != name for checkpoint in known):
            raise missing("a checkpoint", name)
        return job.run.checkpoints / f"step-{int(step):06d}" / "adapter", self._lineage(job) | {"steps": int(step)}

    def cancel(self, name: str) -> dict[str, Any]:
        """Ends a job without a result."""
        with self._change:
            job = self._there(name)
            if job.status not in UNDER_WAY:
                raise conflict(f"expected a job under way, got one that is {job.status}")
            job.update(status="cancelled", finished_at=int(time.time()))
            job.told("The job was cancelled")
            if job is not self._under_hand:
                _clear(job)
            self._change.notify_all()
            return job.shown()

    def pause(self, name: str) -> dict[str, Any]:
        """Holds a job until it is resumed."""
        return self._switch(name, ("queued", "running"), "paused")

    def resume(self, name: str) -> dict[str, Any]:
        """Lets a paused job go on."""
        return self._switch(name, ("paused",), "queued")

    def start(self) -> None:
        """Goes on with what is not ended."""
        with self._change:
            if any(job.status in UNDER_WAY for job in self._jobs.values()):
                self._begin()

    def leave(self) -> None:
        """Has the job under way stop after its step, with a checkpoint. It stays under way for the next server."""
        with self._change:
            self._closing = True
            self._change.notify_all()

    def close(self) -> None:
        """As `leave`, and waits for it."""
        self.leave()
        if self._thread is not None:
            self._thread.join()

    def _opened(self, place: Path) -> Job:
        return Job(place, self._state.path / "runs")

    def _there(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None:
            raise missing("the id of a job", name)
        return job

    def _switch(self, name: str, before: tuple[str, ...], after: str) -> dict[str, Any]:
        with self._change:
            job = self._there(name)
            if job.status not in before:
                raise conflict(f"expected a job that is {' or '.join(before)}, got one that is {job.status}")
            job.update(status=after)
            job.told(f"The job is {after}")
            self._change.notify_all()
            return job.shown()

    def _rows(self, name: str, method: str, param: str) -> Path:
        """An uploaded file's rows, if the method can learn from them."""
        try:
            record = self._files.record(name)
        except Refused:
            raise Refused(f"{param}: expected the id of a file, got {name[:100]!r}", param=param, status=404) from None
        if record["kind"] not in KINDS[method]:
            raise Refused(
                f"{param}: expected rows for {method} ({', '.join(KINDS[method])}), got rows of {record['kind']}",
                param=param,
                code="invalid_training_file",
            )
        return self._files.content(name)

    def _begin(self) -> None:
        """The thread that trains; the processes that it starts live no longer than it does."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ftkit-jobs", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._change:
                while (job := self._next()) is None:
                    if self._closing:
                        return
                    self._change.wait()
                self._under_hand = job
            try:
                self._train(job)
            except FtkitError as error:
                self._fail(job, error.message)
            except OSError as error:
                self._fail(job, f"the job's process: {error.strerror}")
            with self._change:
                self._under_hand = None
                if job.status == "cancelled":
                    _clear(job)

    def _next(self) -> Job | None:
        ready = [job for job in self._jobs.values() if job.status in ("queued", "running", "validating_files")]
        return None if self._closing else min(ready, key=lambda job: (job.record["created_at"], job.id), default=None)

    def _train(self, job: Job) -> None:
        """Trains a job to its end, or until it is not to go on."""
        if job.run.finished() is None:
            _end_orphan(job)
            resumed = job.run.config.is_file()
            code = self._run(job, job.resuming() if resumed else self._arguments(job))
            if code is None:
                return
            if code == 2 and resumed and "steps left" in job.record.get("said", ""):
                # It was killed between its last checkpoint and its result: the same again gives the same.
                code = self._run(job, [*self._arguments(job), "--overwrite"])
                if code is None:
                    return
            if code != 0:
                self._fail(job, job.record.get("said", ""))
                return
        self._finish(job)

    def _arguments(self, job: Job) -> list[str]:
        engine = self._engine
        return job.arguments(str(engine.loaded.path), self._quant, torch.get_num_threads(), engine.context_tokens)

    def _run(self, job: Job, arguments: list[str]) -> int | None:
        """The exit code of the job's process, None when it was made to leave."""
        self._state.room("runs")
        training = Training(arguments, job.folder / "log.txt")
        with self._change:
            if job.status in ("queued", "running"):
                job.update(status="running", pid=training.pid)
                job.told("Fine-tuning goes on" if "--resume" in arguments else "Fine-tuning began")

        def busy() -> bool:
            now = self._engine.busy
            self.paused_for_requests += now and not training.held
            return now

        code = training.drive(busy, lambda: self._closing or job.status != "running")
        if code is None:
            training.end(at_once=job.status == "cancelled")
            return None
        if code != 0:
            with self._change:
                job.update(said=training.said())
        return code

    def _finish(self, job: Job) -> None:
        """The adapter answers at once."""
        result = job.run.finished() or {}
        name = job.model_name()
        self._adapters.add(name, job.run.adapter, self._lineage(job) | {"steps": result.get("steps")})
        metrics = self._state.room("files") / f".tmp-{job.id}"
        text = job.metrics_csv()
        metrics.write_text(text, encoding="utf-8")
        what = {"filename": "step_metrics.csv", "bytes": len(text), "rows": None, "kind": None, "hash": None}
        file = self._files.add(metrics, what, purpose="fine-tune-results")
        with self._change:
            if job.status == "cancelled":
                return
            job.update(
                status="succeeded",
                fine_tuned_model=name,
                finished_at=int(time.time()),
                trained_tokens=result.get("trained_tokens"),
                result_files=[file["id"]],
            )
            job.told(f"The job has successfully completed; the model {name} answers")

    def _fail(self, job: Job, message: str) -> None:
        with self._change:
            if job.status not in UNDER_WAY:
                return
            error = {"code": "training_failed", "message": message, "param": None}
            job.update(status="failed", error=error, finished_at=int(time.time()))
            job.told(f"The job failed: {message}", level="error")

    def _lineage(self, job: Job) -> dict[str, Any]:
        with contextlib.suppress(Refused):
            data = self._files.record(job.record["training_file"]).get("hash")
            return {
                "job": job.id,
                "data": data,
                "base": self._engine.loaded.fingerprint,
                "base_name": self._engine.name,
            }
        return {"job": job.id, "base": self._engine.loaded.fingerprint, "base_name": self._engine.name}


def _clear(job: Job) -> None:
    """Nothing stays of what a job without a result has written."""
    shutil.rmtree(job.run.path, ignore_errors=True)


def _end_orphan(job: Job) -> None:
    """Ends a process of this job that outlived its server, where the kernel doesn't do it."""
    pid = job.record.get("pid")
    with contextlib.suppress(OSError, ValueError):
        if isinstance(pid, int) and job.id.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.killpg(pid, signal.SIGKILL)
            time.sleep(0.2)
