"""Supervised finetuning: the model learns to predict the trained tokens of its examples.

    loss = Σ_t w_t · (−log p(target_t | tokens before)) / Σ_t w_t          over trained positions t

Each trained token counts the same, however the examples are packed or spread over micro-batches.
"""

from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts, losses_of_trained, sums_by_task

PAIRS = False


def loss(forward: Forward, batch: RaggedBatch) -> LossParts:
    """The summed loss and the weight of the trained tokens, one entry a task."""
    return sums_by_task(losses_of_trained(forward, batch), batch)
