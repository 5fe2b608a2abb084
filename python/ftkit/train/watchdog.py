"""The watchdog: sees the ways in which a run quietly learns nothing, and says them in words.

A step whose loss or gradient is not finite, whose gradient is all zero, or whose batch trains no token is skipped and
counted; several in a row end the run. Where updates happen in the backward pass, a gradient is seen too late for that:
its parameter alone is skipped. A loss that stays where it began is reported at the end. Losses of preferences have ways
of their own to go wrong while they fall; those are told, once each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ftkit.errors import FtkitError


@dataclass(frozen=True, kw_only=True)
class Warning:
    """What was seen, for people."""

    kind: str
    message: str
    hint: str


class Watchdog:
    """Judges steps as they come; `patience` bad ones in a row are too many."""

    def __init__(self, patience: int, *, in_backward: bool = False) -> None:
        self._patience = patience
        self._in_backward = in_backward
        self.bad_in_a_row = 0
        self.bad_steps = 0

    def judge(self, step: int, trained_tokens: float, loss: float, gradient_norm: float) -> Warning | None:
        """What is wrong with the step, so that it must be skipped, or None. Raises FtkitError after too many."""
        warning = _look(step, trained_tokens, loss, gradient_norm, self._in_backward)
        if warning is None:
            self.bad_in_a_row = 0
            return None
        self.bad_in_a_row += 1
        self.bad_steps += 1
        if self.bad_in_a_row >= self._patience:
            raise FtkitError(f"stopped after {self.bad_in_a_row} bad steps in a row: {warning.message}", warning.hint)
        return warning


def _look(step: int, trained_tokens: float, loss: float, gradient_norm: float, in_backward: bool) -> Warning | None:
    if trained_tokens == 0:
        return Warning(
            kind="nothing_trained",
            message=f"step {step}: expected tokens to train on, got a batch in which all are masked",
            hint="look at the loss mask with `ftkit data show`; answers may be cut off by data.max_tokens",
        )
    if not math.isfinite(loss):
        return Warning(
            kind="loss_not_finite",
            message=f"step {step}: expected a finite loss, got {loss}; the step was skipped",
            hint="lower optimizer.learning_rate, or check the base weights for NaN",
        )
    if not math.isfinite(gradient_norm):
        return Warning(
            kind="gradient_not_finite",
            message=f"step {step}: expected a finite gradient, got a norm of {gradient_norm}; "
            + ("parameters with such a gradient were skipped" if in_backward else "the step was skipped"),
            hint="lower optimizer.learning_rate, or compute in float32 (model.dtype)",
        )
    if gradient_norm == 0:
        return Warning(
            kind="gradient_zero",
            message=f"step {step}: expected a gradient, got zero in every trained parameter"
            + ("" if in_backward else "; the step was skipped"),
            hint="the method's options may leave nothing that can learn, such as a scale of 0",
        )
    return None


class Preferences:
    """Sees preferences go wrong: both answers becoming less likely, and a loss that is gone too soon."""

    FALLING_STEPS = 50
    GONE = 0.01
    EARLY = 0.2

    def __init__(self) -> None:
        self._falling = 0
        self._told: set[str] = set()

    def watch(self, step: int, passes: float, loss: float, metrics: Mapping[str, float]) -> list[Warning]:
        """What a step shows that was not told before; `passes`: how often the data has been gone through.

        An objective without the metrics of preferences has nothing to be seen.
        """
        if "reward_accuracy" not in metrics:
            return []
        self._falling = self._falling + 1 if metrics.get("chosen_log_ratio", 0.0) < 0 else 0
        seen = []
        if self._falling >= self.FALLING_STEPS:
            seen.append(
                Warning(
                    kind="chosen_falls",
                    message=f"step {step}: expected chosen answers to become likelier, got less likely ones than the "
                    f"reference's for {self._falling} steps",
                    hint="finetune on chosen answers first (sft), raise objective.beta, or lower the learning rate",
                )
            )
        if loss < self.GONE and passes < self.EARLY:
            seen.append(
                Warning(
                    kind="loss_gone",
                    message=f"step {step}: expected preferences to take an epoch to learn, got a loss of {loss:.4f} "
                    f"after {passes:.0%} of one",
                    hint="lower optimizer.learning_rate, or look for what gives chosen answers away (ftkit data show)",
                )
            )
        new = [warning for warning in seen if warning.kind not in self._told]
        self._told |= {warning.kind for warning in new}
        return new


def never_moved(losses: list[float]) -> Warning | None:
    """A warning when the last third of the losses lies where the first third lay, as far as their noise lets one see.

    Fewer than 12 finite losses say nothing.
    """
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) < 12:
        return None
    part = len(losses) // 3
    (first, first_error), (last, last_error) = _mean(losses[:part]), _mean(losses[-part:])
    noise = math.hypot(first_error, last_error)
    if first - last > max(0.002 * abs(first), noise):
        return None
    return Warning(
        kind="loss_never_moved",
        message=f"expected the loss to fall, got {last:.4f} at the end after {first:.4f} at the start (±{noise:.4f})",
        hint="the learning rate may be far too low or too high, the run too short, or the data nothing but what the "
        "model already knows",
    )


def _mean(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
