"""Simple preference optimization: the chosen answer is likelier a token than the rejected one, by a margin.

    loss = mean over pairs of −log σ(β (ℓ⁺ − ℓ⁻) − γ)          ℓ = log π(y | x) / |y|

There is no reference, so a step costs what one of `sft` on as many tokens does, and nothing but a small learning rate
(3e-7 to 1e-6 when all weights are trained) keeps the model near where it began.

Source: Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024, arXiv 2405.14734.
"""

from dataclasses import dataclass

from ftkit.config import option
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts
from ftkit.objectives._preference import pairs_of, preferred

PAIRS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """SimPO's settings."""

    beta: float = option(2.0, "scale of the reward; 2 to 10", above=0)
    gamma: float = option(1.0, "the margin that is asked for; about half of beta", at_least=0)
    label_smoothing: float = option(0.0, "the share of preferences that are wrong", at_least=0, below=0.5)


def loss(forward: Forward, batch: RaggedBatch, config: Config) -> LossParts:
    """The summed loss and the number of pairs."""
    pairs = pairs_of(forward, batch)
    rewards = config.beta * pairs.means(pairs.logps)
    margins = rewards[:, 0] - rewards[:, 1] - config.gamma
    return pairs.parts(preferred(margins, config.label_smoothing), rewards)
