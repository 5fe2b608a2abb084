"""Cosine: the rate falls along half a cosine, slow at both ends. The usual choice.

    end + (1 − end) · (1 + cos(π · progress)) / 2

Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, arXiv 1608.03983.
"""

import math
from dataclasses import dataclass

from ftkit.config import option
from ftkit.optim.schedules._warmup import Warmup


@dataclass(frozen=True, kw_only=True)
class Config(Warmup):
    """Where the curve ends."""

    end: float = option(0.0, "the last rate as a part of the highest", at_least=0, at_most=1)


def factor(progress: float, config: Config) -> float:
    """From 1 to `end` along half a cosine."""
    return config.end + (1 - config.end) * 0.5 * (1 + math.cos(math.pi * progress))
