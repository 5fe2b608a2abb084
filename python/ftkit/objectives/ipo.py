"""Identity preference optimization: the chosen answer's lead is drawn to a fixed margin instead of pushed without end.

    loss = mean over pairs of (h⁺ − h⁻ − 1 / (2τ))²          h = (log π(y | x) − log π_ref(y | x)) / |y|

DPO's margin grows as long as preferences are unanimous, whatever β; this one has a place to stop. h is a mean over the
answer's tokens, as the paper's authors confirmed to trl; `normalise_by_length = false` takes the paper's letter.

Source: Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023, arXiv
2310.12036.
"""

from dataclasses import dataclass

from ftkit.config import option
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts
from ftkit.objectives._preference import pairs_of

PAIRS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """IPO's settings."""

    tau: float = option(0.1, "how dear it is to leave the reference: the lead is drawn to 1 / (2 tau)", above=0)
    normalise_by_length: bool = option(True, "log-ratios a token, so that the margin is the same for all lengths")


def loss(forward: Forward, batch: RaggedBatch, config: Config) -> LossParts:
    """The summed loss and the number of pairs. Raises InputError when training changes the base itself."""
    pairs = pairs_of(forward, batch, "ipo")
    ratios = pairs.means(pairs.log_ratios) if config.normalise_by_length else pairs.log_ratios
    leads = ratios[:, 0] - ratios[:, 1]
    return pairs.parts((leads - 1 / (2 * config.tau)).square(), config.tau * ratios)
