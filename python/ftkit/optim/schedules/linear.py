"""Linear: the rate falls in equal parts to its end. Finds good ends of short runs.

Source: Defazio et al., Optimal Linear Decay Learning Rate Schedules and Further Refinements, 2023, arXiv 2310.07831.
"""

from dataclasses import dataclass

from ftkit.config import option
from ftkit.optim.schedules._warmup import Warmup


@dataclass(frozen=True, kw_only=True)
class Config(Warmup):
    """Where the line ends."""

    end: float = option(0.0, "the last rate as a part of the highest", at_least=0, at_most=1)


def factor(progress: float, config: Config) -> float:
    """From 1 to `end` along a line."""
    return 1 - (1 - config.end) * progress
