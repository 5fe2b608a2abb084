"""Training with products in 8 bits (`training.precision = int8`), and the watch over it.

The first steps, and then one in `EVERY`, are made twice: in 8 bits, and exactly. The exact gradient is the one that is
used, and the other one is held against it: its direction, and the loss. Where they differ too much, the run goes on
exactly, says so, and stays so when it is resumed. Evaluations are always exact.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.nn.decoder import Decoder
from ftkit.nn.eight_bits import EightBitProducts, in_eight_bits
from ftkit.train.step import StepOutcome
from ftkit.train.watchdog import Warning

FIRST = 3
EVERY = 50
LEAST_COSINE = 0.95
MOST_LOSS = 0.01
"""Relative difference of the losses of `TOKENS` targets, or more."""
TOKENS = 512
"""Roundings point either way, so that the mean over fewer differs by more: as the root of their number falls."""

Parameters = Mapping[str, torch.nn.Parameter]


def attach(config: RunConfig, model: Decoder) -> list[EightBitProducts]:
    """Puts the model's frozen matrices into 8 bits, as the configuration asks; empty when it doesn't.

    The head's stay exact: its logits are the loss.
    """
    training = config.training
    if training.precision != "int8":
        return []
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise InputError(
            f"training.precision: expected float32 on the CPU with int8, got {model.dtype} on {model.device.type}",
            "leave model.dtype at float32, or training.precision at dtype",
        )
    if training.optimizer_in_backward:
        raise InputError(
            "training.precision: expected dtype with optimizer_in_backward, got int8",
            "gradients that are freed cannot be compared with exact ones",
        )
    found = in_eight_bits(linear for name, linear in model.linears().items() if linear is not model.lm_head)
    if not found:
        raise InputError("training.precision: expected frozen matrices whose sides 32 divides for int8, got none")
    return found


def is_checked(step: int) -> bool:
    """Whether a step, counted from 1, is made twice."""
    return step <= FIRST or step % EVERY == 0


def compared(
    weights: Sequence[EightBitProducts], parameters: Parameters, make: Callable[[], StepOutcome], step: int
) -> tuple[StepOutcome, Warning | None]:
    """The exact outcome, whose gradients are left in the parameters, and what is wrong with the rounded ones.

    `make` leaves gradients where there were none, the same each time. Weights that are wrong stay exact.
    """
    rounded = make()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    be_exact(weights, True)
    exact = make()
    cosine = _cosine((gradients.get(name), parameter.grad) for name, parameter in parameters.items())
    difference = abs(rounded.loss - exact.loss) / max(abs(exact.loss), 1e-6)
    most = MOST_LOSS * math.sqrt(max(1.0, TOKENS / max(exact.trained_tokens, 1)))
    trusted = not math.isfinite(exact.loss) or (cosine >= LEAST_COSINE and difference <= most)
    be_exact(weights, not trusted)
    if trusted:
        return exact, None
    return exact, Warning(
        kind="rounding",
        message=f"step {step}: expected products in 8 bits to give a gradient along the exact one (cosine of at least "
        f"{LEAST_COSINE}) and a loss within {most:.1%}, got {cosine:.4f} and {difference:.2%}; the run goes on "
        "exactly",
        hint="training.precision=dtype spares the comparison",
    )


def be_exact(weights: Iterable[EightBitProducts], exact: bool) -> None:
    """Turns rounding off, or on."""
    for weight in weights:
        weight.exact = exact


def _cosine(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> float:
    """Of two gradients in parts; 1 where the second is zero, and has no direction."""
    along = ours = theirs = 0.0
    for one, other in pairs:
        if one is not None and other is not None:
            along += float((one.double() * other).sum())
        ours += 0.0 if one is None else float(one.double().square().sum())
        theirs += 0.0 if other is None else float(other.double().square().sum())
    return 1.0 if theirs == 0 else along / math.sqrt(ours * theirs) if ours > 0 else 0.0
