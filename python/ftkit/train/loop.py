"""The loop: steps, evaluations, checkpoints, until the steps are done or someone or something stops it.

What decides a step's bits is the weights, the batches and the seed; not the clock, nor how often it was evaluated,
checkpointed or resumed.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from ftkit.errors import FtkitError, Interrupted
from ftkit.nn.batch import UNTRAINED, RaggedBatch
from ftkit.optim import schedules
from ftkit.plan.budget import written
from ftkit.train import checkpoint, checkpoints, memory, rounding, watchdog
from ftkit.train.directory import RunDirectory
from ftkit.train.events import Events
from ftkit.train.session import Session
from ftkit.train.signals import Interruption
from ftkit.train.step import Means, StepOutcome, clear, each_gradient, gradients, means, step_in_backward

Result = TypeVar("Result")


class Loop:
    """A run in motion. `progress` is where it is; everything else stands still."""

    def __init__(
        self,
        session: Session,
        run: RunDirectory,
        progress: checkpoint.Progress,
        events: Events,
        losses: list[float],
        stop: Interruption,
    ) -> None:
        self.session = session
        self.run = run
        self.progress = progress
        self._events = events
        self._stop = stop
        self._losses = losses
        training = session.config.training
        self._watchdog = watchdog.Watchdog(training.stop_after_bad_steps, in_backward=training.optimizer_in_backward)
        self._watchdog.bad_steps, self._watchdog.bad_in_a_row = progress.bad_steps, progress.bad_in_a_row
        self._preferences = watchdog.Preferences()
        self._measured: tuple[int, ...] = (0, 0, 0, 0)  # of steps whose memory was counted, as `_most` says
        self._evaluated = False
        self._started = (progress.step, progress.seconds)
        self._feed = session.feed(progress.batches)
        self._saved = progress.step  # the step of the newest checkpoint; 0: there is none
        progress.parts = max(progress.parts, session.plan.way.parts)
        rounding.be_exact(session.rounded, progress.exact)

    def train(self) -> None:
        """Runs to the end. Raises Interrupted after a checkpoint, FtkitError when the watchdog gives up."""
        session, progress = self.session, self.progress
        every = session.config.output.checkpoint_every_steps
        evaluate_every = session.config.evaluation.every_steps if session.evaluation is not None else 0
        self._rehearse()
        if progress.step == 0 and evaluate_every:
            self._tell_evaluation(self._evaluate(), best=False)
        while progress.step < session.steps:
            if any(session.processes.exchange(self._stop.requested)):
                self._interrupt()
            self._step()
            done = progress.step == session.steps
            improved = False
            if evaluate_every and (done or progress.step % evaluate_every == 0):
                improved = self._judge_evaluation()
            enough = self._patience_is_over()
            if done or enough or improved or progress.step % every == 0:
                self.save()
            if enough:
                break
        warning = watchdog.never_moved(self._losses)
        if warning is not None:
            self._warn(warning)

    def save(self) -> None:
        """Writes a checkpoint and removes those that are no longer wanted."""
        session, progress = self.session, self.progress
        if self._saved == progress.step > 0:
            return  # writing the same again could only lose it
        self._saved = progress.step
        held = session.parameters, session.optimizer, session.save_adapter
        if session.processes.first:
            path = checkpoint.save(self.run.checkpoints, progress, *held)
            checkpoints.prune(self.run.checkpoints, session.config.output.keep_checkpoints, progress.best_step)
            self._events.emit("checkpoint", progress.step, path=str(path))
        elif session.processes.sharded:
            checkpoint.give(*held)

    def _rehearse(self) -> None:
        """The batch that needs most memory comes first, for that alone: what would fail for want of it fails now."""
        session = self.session

        def work(batches: list[RaggedBatch]) -> None:
            for batch in batches:
                self._make_room(batch)
                if session.config.training.optimizer_in_backward:
                    with each_gradient(session.parameters, lambda *_: None):
                        session.loss(batch).sum.sum().backward()
                else:
                    session.loss(batch).sum.sum().backward()

        batches = [session.worst(self.progress.parts)]
        try:
            _, peak = memory.peak_bytes_of(
                lambda: self._within_memory(work, batches), session.tensors(), session.device
            )
        finally:
            clear(session.parameters)
        self.progress.peak_bytes = max(self.progress.peak_bytes, peak)
        self._events.emit(
            "memory",
            self.progress.step,
            peak_bytes=peak,
            planned_peak_bytes=session.plan.peak_bytes,
            planned_by_category=session.plan.by_category,
            peak_rss_bytes=memory.peak_rss_bytes(),
            planned_peak_rss_bytes=session.plan.peak_rss_bytes,
        )

    def _make_room(self, batch: RaggedBatch) -> None:
        """For the batch. Raises MemoryError where the run would take more than it may, and the batch can be cut."""
        session, plan = self.session, self.session.plan
        if session.device.type == "cuda":
            return
        more = plan.batch_bytes * batch.tokens.numel() // plan.shape.tokens
        memory.keep_below(plan.peak_rss_bytes, more)
        in_backward = session.config.training.optimizer_in_backward
        short = (has := memory.rss_bytes()) + more > session.room and not in_backward and len(batch.cut(2)) > 1
        if session.processes.agree(short):
            raise memory.NoRoom(
                f"the process has {written(has)}, a batch takes {written(more)}: {written(session.room)} allowed"
            )

    def _within_memory(self, work: Callable[[list[RaggedBatch]], Result], batches: list[RaggedBatch]) -> Result:
        """Makes gradients from batches, and where memory runs out, anew from the same ones in more parts."""
        session, progress = self.session, self.progress
        while True:
            clear(session.parameters)
            try:
                return work(batches)
            except (MemoryError, RuntimeError) as error:
                if not memory.is_exhausted(error):
                    raise
                reason = str(error).splitlines()[0]
                alone = session.processes.sharded and not isinstance(error, memory.NoRoom)
            finer = [part for batch in batches for part in batch.cut(2)]
            # where one process alone has failed, the others are in the midst of a pass
            goes_on = not alone and session.processes.agree(len(finer) > len(batches))
            if not goes_on or session.config.training.optimizer_in_backward:
                what = "a process that shares out weights" if alone else "a batch that cannot be cut further"
                raise FtkitError(
                    f"memory ran out after step {progress.step}, in {what}: {reason}",
                    "shorter rows (data.max_tokens) or a quantized base take less; ftkit plan says what fits",
                )
            batches = finer
            progress.parts *= 2
            told = f"batches are cut into {progress.parts} parts from here on, for the same update"
            self._events.emit("notice", progress.step, message=f"memory ran out ({reason}); {told}")

    def _step(self) -> None:
        session, progress, training = self.session, self.progress, self.session.config.training
        torch.manual_seed(_step_seed(training.seed, progress.step, session.processes.rank))
        portions = [next(self._feed) for _ in range(training.gradient_accumulation_steps)]
        batches = [session.batch(rows) for rows in session.processes.part(portions)]
        start = time.perf_counter()
        if session.tasks is not None:
            lacking = session.tasks.warning(progress.step + 1, batches)
            if lacking is not None:
                self._warn(lacking)
            batches = session.tasks.balance(batches, progress, session.loss, session.loaded.model)
        batches = [part for batch in batches for part in batch.cut(progress.parts)]
        factor = schedules.factor(session.config.schedule, progress.step, session.steps)
        largest = (*_most(batches[:1]), *_most(batches[1:]))

        def made(batches: list[RaggedBatch]) -> StepOutcome:
            loss, parameters = session.loss, session.parameters
            if training.optimizer_in_backward:
                batch = batches[0] if batches else session.spare(portions[0], 1)
                assert batch is not None
                self._make_room(batch)
                counts = len(batches) > 0
                return step_in_backward(
                    loss, parameters, batch, session.optimizer, factor, session.processes, counts=counts
                )
            norm, room, spare = training.max_gradient_norm, self._make_room, session.spare(portions[0], progress.parts)
            return gradients(loss, parameters, batches, norm, room, session.processes, spare)

        def work() -> tuple[StepOutcome, watchdog.Warning | None]:
            outcome = self._outcome(lambda: self._within_memory(made, batches))
            warning = self._watchdog.judge(progress.step + 1, outcome.trained, outcome.loss, outcome.gradient_norm)
            if warning is None and not training.optimizer_in_backward:
                session.optimizer.step(factor)
            return outcome, warning

        try:
            if any(now > before for now, before in zip(largest, self._measured, strict=True)):
                # it may need more than those before
                (outcome, warning), peak = memory.peak_bytes_of(work, session.tensors(), session.device)
                progress.peak_bytes = max(progress.peak_bytes, peak)
                self._measured = tuple(map(max, largest, self._measured))
            else:
                outcome, warning = work()
        finally:
            clear(session.parameters)
        seconds = time.perf_counter() - start
        self._stop.longest_step_seconds = max(self._stop.longest_step_seconds, seconds)
        progress.step += 1
        progress.batches += len(portions)
        progress.tokens += outcome.tokens
        progress.trained_tokens += outcome.trained_tokens
        progress.seconds += seconds
        progress.bad_steps, progress.bad_in_a_row = self._watchdog.bad_steps, self._watchdog.bad_in_a_row
        if warning is None:
            progress.loss = outcome.loss
            self._losses.append(outcome.loss)
            for seen in self._preferences.watch(progress.step, self._passes(), outcome.loss, outcome.metrics):
                self._warn(seen)
        else:
            self._warn(warning)
        steps, before = self._started
        pace = (progress.seconds - before) / (progress.step - steps)
        self._events.emit(
            "step",
            progress.step,
            loss=outcome.loss,
            learning_rate=session.optimizer.learning_rate * factor,
            gradient_norm=outcome.gradient_norm,
            tokens=outcome.tokens,
            trained_tokens=outcome.trained_tokens,
            seconds=round(seconds, 4),
            tokens_per_second=round(outcome.tokens / seconds, 1),
            seconds_left=round(pace * (session.steps - progress.step), 1),
            rss_bytes=memory.rss_bytes(),
            **({"metrics": outcome.metrics} if outcome.metrics else {}),
        )

    def _outcome(self, make: Callable[[], StepOutcome]) -> StepOutcome:
        """Of a step; where products are rounded, every so often held against the exact one's, which it then is."""
        session, progress = self.session, self.progress
        if not session.rounded or progress.exact or not rounding.is_checked(progress.step + 1):
            return make()

        def again() -> StepOutcome:
            torch.manual_seed(_step_seed(session.config.training.seed, progress.step, session.processes.rank))
            return make()

        outcome, warning = rounding.compared(session.rounded, session.parameters, again, progress.step + 1)
        if warning is not None:
            progress.exact = True
            self._warn(warning)
        return outcome

    def _evaluate(self) -> Means:
        session = self.session
        assert session.evaluation is not None
        session.loaded.model.eval()
        try:
            mine = session.evaluation[session.processes.rank :: session.processes.size]
            parts = [part for batch in mine for part in batch.cut(self.progress.parts)]
            spare = session.evaluation[0].cut(self.progress.parts)[0] if session.processes.sharded else None
            if self._evaluated:
                return means(session.loss, parts, session.processes, spare)
            self._evaluated = True  # the others take as much
            found, peak = memory.peak_bytes_of(
                lambda: means(session.loss, parts, session.processes, spare), session.tensors(), session.device
            )
            self.progress.peak_bytes = max(self.progress.peak_bytes, peak)
            return found
        finally:
            session.loaded.model.train()

    def _judge_evaluation(self) -> bool:
        """Evaluates, and whether it was the best so far."""
        progress, found = self.progress, self._evaluate()
        loss = found.loss
        better = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
        if better:
            progress.best_loss, progress.best_step, progress.evaluations_without_better = loss, progress.step, 0
        else:
            progress.evaluations_without_better += 1
        self._tell_evaluation(found, best=better)
        return better

    def _tell_evaluation(self, found: Means, *, best: bool) -> None:
        metrics = {"metrics": found.metrics} if found.metrics else {}
        self._events.emit("evaluation", self.progress.step, loss=found.loss, best=best, **metrics)

    def _passes(self) -> float:
        """How often the data has been gone through."""
        return self.progress.batches * self.session.config.training.batch_rows / len(self.session.dataset)

    def _patience_is_over(self) -> bool:
        patience = self.session.config.evaluation.patience
        over = 0 < patience <= self.progress.evaluations_without_better
        if over:
            self._events.emit(
                "notice",
                self.progress.step,
                message=f"stopped early: {patience} evaluations in a row were not better than "
                f"{self.progress.best_loss:.4f} at step {self.progress.best_step}",
            )
        return over

    def _interrupt(self) -> None:
        self.save()
        self._events.emit("interrupted", self.progress.step)
        raise Interrupted(
            f"interrupted after step {self.progress.step} of {self.session.steps}; its checkpoint is written",
            f"continue with: ftkit train --resume --name {self.run.name}",
        )

    def _warn(self, warning: watchdog.Warning) -> None:
        self._events.emit("warning", self.progress.step, **dataclasses.asdict(warning))


def _most(batches: list[RaggedBatch]) -> tuple[int, int]:
    """The most tokens and the most trained ones of a batch."""
    trained = (int((batch.targets != UNTRAINED).sum()) for batch in batches if batch.targets is not None)
    return max((batch.tokens.numel() for batch in batches), default=0), max(trained, default=0)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for the randomness of one step, such as dropout, in one process."""
    told = f"{seed}/{step}/{rank}" if rank else f"{seed}/{step}"
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 1
