"""Direct preference optimization: the chosen answer gains on the rejected one, measured against the base model.

    loss = mean over pairs of −log σ(β (h⁺ − h⁻))          h = log π(y | x) − log π_ref(y | x)

A policy that minimises it is π ∝ π_ref · exp(r / β), with the reward r that explains the preferences (Bradley and
Terry's model): β says how dear it is to leave the reference. `label_smoothing` ε mixes in the loss of the labels
the wrong way round, for preferences that are wrong in that share; `normalise_by_length` divides h by the answer's
tokens, and then β is to be about 20 times as large. Answers tend to become longer with it; `lc_dpo` takes length
out. Start from a model that has been finetuned on such answers, with learning rates far below those of `sft`.

Source: Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model, 2023, arXiv
2305.18290; the smoothing: Mitchell, A note on DPO with noisy preferences, 2023.
"""

from dataclasses import dataclass

from ftkit.config import option
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts
from ftkit.objectives._preference import pairs_of, preferred

PAIRS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """DPO's settings."""

    beta: float = option(0.1, "how dear it is to leave the reference", above=0)
    label_smoothing: float = option(0.0, "the share of preferences that are wrong", at_least=0, below=0.5)
    normalise_by_length: bool = option(False, "log-ratios a token; beta wants to be about 20 times as large")


def loss(forward: Forward, batch: RaggedBatch, config: Config) -> LossParts:
    """The summed loss and the number of pairs. Raises InputError when training changes the base itself."""
    pairs = pairs_of(forward, batch, "dpo")
    rewards = config.beta * (pairs.means(pairs.log_ratios) if config.normalise_by_length else pairs.log_ratios)
    margins = rewards[:, 0] - rewards[:, 1]
    return pairs.parts(preferred(margins, config.label_smoothing), rewards)
