"""Distillation from the base model: the adapted model learns to predict what the model without adapter does.

    loss = Σ_t w_t · D(p_t ‖ q_t) / Σ_t w_t          over trained positions t

p is the distribution of the base model, without adapter, at the same position of the same text; q that of the adapted
one. The teacher is the same weights, so it costs a forward pass and no memory for another model. D is the forward
Kullback-Leibler divergence KL(p ‖ q), which makes the student cover all that the teacher may say; the reverse one
KL(q ‖ p), which makes it say nothing that the teacher would not; or the generalized Jensen-Shannon divergence between
them. Which token the text has does not matter, only where it is trained on: `data.train_on = "all"` learns everywhere.

Choose it to make up for quantization (`--method qalora --set method.variant=joint`), with text that the model itself
wrote (`ftkit data generate`). A method that edits the base's own weights has no teacher and is refused.

Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; Agarwal et al., On-Policy
Distillation of Language Models, 2023, arXiv 2306.13649.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ftkit.config import option
from ftkit.kernels.divergence import divergence
from ftkit.nn.batch import NO_ADAPTER, RaggedBatch
from ftkit.nn.loss import row_losses
from ftkit.nn.routes import Routes
from ftkit.objectives import Forward, LossParts, _reference, sums_by_task, trained_rows

PAIRS = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distillation's settings."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        "forward_kl", "forward_kl: KL(teacher ‖ student); reverse_kl: KL(student ‖ teacher); jsd: between them, by beta"
    )
    beta: float = option(0.5, "jsd: the teacher's share of the mixture; near 0 as forward_kl", above=0, below=1)
    temperature: float = option(1.0, "divides the logits of both", above=0)


def loss(forward: Forward, batch: RaggedBatch, config: Config) -> LossParts:
    """The summed divergence and the weight of the trained tokens, one entry a task.

    Raises InputError when training changes the base itself.
    """
    _reference.check(forward, "distill")
    with torch.no_grad():
        teacher, _ = trained_rows(forward, batch.with_adapter(NO_ADAPTER))
    hidden, options = trained_rows(forward, batch)

    def measure(logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            wanted = forward.head(teacher[rows], Routes(((NO_ADAPTER, 0, logits.shape[0]),)))
        return divergence(logits, wanted, config.divergence, config.beta, config.temperature, gradient)

    return sums_by_task(row_losses(forward.head, hidden, measure, forward.config.vocab_size, **options), batch)
