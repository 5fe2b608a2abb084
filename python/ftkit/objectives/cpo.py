"""Contrastive preference optimization: the chosen answer gains on the rejected one, and is learnt as such.

    loss = mean over pairs of −log σ(β (ℓ⁺ − ℓ⁻)) − α ℓ⁺ / |y⁺|          ℓ = log π(y | x)

DPO with a uniform reference, so without a reference's forward pass; the second term, the supervised loss of the
chosen answer, keeps the model where answers are likely.

Source: Xu et al., Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
Translation, 2024, arXiv 2401.08417.
"""

from dataclasses import dataclass

from ftkit.config import option
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts
from ftkit.objectives._preference import pairs_of, preferred

PAIRS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """CPO's settings."""

    beta: float = option(0.1, "scale of the reward", above=0)
    alpha: float = option(1.0, "weight of the chosen answer's supervised loss", at_least=0)
    label_smoothing: float = option(0.0, "the share of preferences that are wrong", at_least=0, below=0.5)


def loss(forward: Forward, batch: RaggedBatch, config: Config) -> LossParts:
    """The summed loss and the number of pairs."""
    pairs = pairs_of(forward, batch)
    rewards = config.beta * pairs.logps
    supervised = -pairs.means(pairs.logps)[:, 0]
    margins = rewards[:, 0] - rewards[:, 1]
    return pairs.parts(preferred(margins, config.label_smoothing) + config.alpha * supervised, rewards)
