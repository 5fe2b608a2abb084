"""Length-controlled DPO: preferences that are owed to length are taken out of what is learnt.

    loss = mean over pairs of −log σ(β (h⁺ − h⁻) + α (|y⁺| − |y⁻|))          h = log π(y | x) − log π_ref(y | x)

The data's reward is taken to be β h + α |y|: raters like a longer answer by α a token, so a longer chosen answer needs
less of a margin, and what is left to learn is the rest. α = 0 is `dpo`. Choose it where chosen answers are longer
than rejected ones (a run warns of that) and the model's own answers are not to grow.

Source: Park et al., Disentangling Length from Quality in Direct Preference Optimization, 2024, arXiv 2403.19159.
"""

from dataclasses import dataclass

from ftkit.config import option
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts
from ftkit.objectives._preference import pairs_of, preferred

PAIRS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Length-controlled DPO's settings."""

    beta: float = option(0.1, "how dear it is to leave the reference", above=0)
    alpha: float = option(0.05, "what raters like a token of length by, in units of the margin", at_least=0)
    label_smoothing: float = option(0.0, "the share of preferences that are wrong", at_least=0, below=0.5)


def loss(forward: Forward, batch: RaggedBatch, config: Config) -> LossParts:
    """The summed loss and the number of pairs. Raises InputError when training changes the base itself."""
    pairs = pairs_of(forward, batch, "lc_dpo")
    rewards = config.beta * pairs.log_ratios
    margins = (rewards + config.alpha * pairs.tokens).diff(dim=1).neg().squeeze(1)
    return pairs.parts(preferred(margins, config.label_smoothing), rewards)
