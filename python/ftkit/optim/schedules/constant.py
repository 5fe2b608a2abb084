"""Constant: the highest rate to the end. For runs whose end is not known, and for reading the effect of a rate."""

from dataclasses import dataclass

from ftkit.optim.schedules._warmup import Warmup


@dataclass(frozen=True, kw_only=True)
class Config(Warmup):
    """Only the warm-up."""


def factor(progress: float, config: Config) -> float:  # noqa: ARG001 (a schedule's signature)
    """1 everywhere."""
    return 1.0
