"""Odds-ratio preference optimization: supervised finetuning on chosen answers that makes rejected ones less likely.

    loss = mean over pairs of −ℓ⁺ − λ log σ(log odds⁺ − log odds⁻)          ℓ = log π(y | x) / |y|
    log odds = ℓ − log(1 − exp ℓ)

It needs no reference and no finetuning before it. The odds' slope grows without end as an answer becomes certain
(1 / |ℓ|), so ℓ counts as at most −1e-4 there, which is an answer that is as good as certain.

The supervised loss is that of the answer; the paper's code and trl's train on the prompt's tokens with it, too.

Source: Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, 2024, arXiv 2403.07691.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ftkit.config import option
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts
from ftkit.objectives._preference import pairs_of, preferred

PAIRS = True
_MOST_CERTAIN = -1e-4
_HALF = -0.6931471805599453


@dataclass(frozen=True, kw_only=True)
class Config:
    """ORPO's settings."""

    odds_weight: float = option(0.1, "λ: the weight of the odds' ratio beside the supervised loss", at_least=0)


def loss(forward: Forward, batch: RaggedBatch, config: Config) -> LossParts:
    """The summed loss and the number of pairs."""
    pairs = pairs_of(forward, batch)
    means = pairs.means(pairs.logps)
    odds = log_odds(means)
    losses = config.odds_weight * preferred(odds[:, 0] - odds[:, 1], 0.0) - means[:, 0]
    return pairs.parts(losses, config.odds_weight * means)


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 − p)) of log p ≤ 0; finite, and so is its slope."""
    sure = logps.clamp(max=_MOST_CERTAIN)
    return sure - log1mexp(sure)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp x) of x < 0, by the branch that keeps its digits."""
    return torch.where(x < _HALF, torch.log1p(-x.exp()), (-torch.expm1(x)).log())
