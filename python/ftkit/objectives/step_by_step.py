"""Distilling step by step: the model learns to answer, and as a task beside it to say why.

    loss = α · mean −log p(label | "predict: " x) + (1 − α) · mean −log p(rationale | "explain: " x)

Rows are `prompt`, `label` and `rationale`: an answer, and the reasons that a larger model or a person gave for it. Each
becomes two sequences, with the word before the question that says which of them is asked for. The means are over the
tokens of all labels and of all rationales of a step, so that long rationales weigh no more than α says. The rationale
teaches what to look at, and costs nothing later: ask `predict: …`, and the model answers without thinking aloud.

Choose it where answers are few and somebody can explain them. α = 1 is supervised finetuning on the labels alone.

Source: Hsieh et al., Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data and Smaller
Model Sizes, 2023, arXiv 2305.02301.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftkit.config import option
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts
from ftkit.objectives._tasks import Add, loss_by_task, weighed

PAIRS = False
EXPLAINED = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Step-by-step distillation's settings."""

    alpha: float = option(0.5, "the labels' share of the loss; the rationales have the rest", at_least=0, at_most=1)


def loss(forward: Forward, batch: RaggedBatch, config: Config, names: Sequence[str] = ()) -> LossParts:  # noqa: ARG001
    """The weighted losses and their weights, by task: labels, rationales."""
    return loss_by_task(forward, batch, names)


def balanced(
    batches: Sequence[RaggedBatch],
    config: Config,
    names: Sequence[str],
    losses: Sequence[Sequence[float]] = (),  # noqa: ARG001
    add: Add = lambda sums: sums,
) -> list[RaggedBatch]:
    """A step's batches with the weights of their tokens."""
    shares = torch.tensor([config.alpha, 1 - config.alpha], dtype=torch.float64)
    return weighed(batches, len(names), lambda _: shares, add=add)
