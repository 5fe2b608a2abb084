"""WSD: warm-up, a long stable part at the highest rate, then a decay. Any stable checkpoint can be trained on.

    1 while progress < 1 − decay_share, then end + (1 − end) · (1 − √part), part of the decay that is done

Source: Hu et al., MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies, 2024,
arXiv 2404.06395; the root: Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations,
2024, arXiv 2405.18392.
"""

import math
from dataclasses import dataclass

from ftkit.config import option
from ftkit.optim.schedules._warmup import Warmup


@dataclass(frozen=True, kw_only=True)
class Config(Warmup):
    """How long the decay is and where it ends."""

    decay_share: float = option(0.2, "part of the steps after the warm-up in which the rate falls", above=0, at_most=1)
    end: float = option(0.0, "the last rate as a part of the highest", at_least=0, at_most=1)


def factor(progress: float, config: Config) -> float:
    """1, then down to `end` along a root."""
    part = (progress - (1 - config.decay_share)) / config.decay_share
    return 1.0 if part <= 0 else config.end + (1 - config.end) * (1 - math.sqrt(part))
