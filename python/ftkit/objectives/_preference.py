"""What losses of preferences share: log-probabilities of whole answers, under the adapter and without it.

    ℓ(y) = Σ_t log π(y_t | x, y_<t)          h(y) = ℓ(y) − ℓ_ref(y)          |y|: the answer's trained tokens

A batch holds pairs: its sequences are a chosen answer (y⁺), its rejected one (y⁻), the next chosen one, and so on, each
after its prompt x; where the batch says so (`shared`), the prompt of both is computed once. The reference is the model
without adapter, on the same sequences, without gradient. A loss counts pairs, not tokens, so packing and accumulation
change nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ftkit.nn.batch import NO_ADAPTER, RaggedBatch
from ftkit.objectives import Forward, LossParts, _reference, losses_of_trained


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """P pairs; tensors are [P, 2], the chosen answers in the first column, f32 or f64."""

    logps: Tensor
    """ℓ, differentiable."""
    tokens: Tensor
    """|y|"""
    log_ratios: Tensor
    """h, differentiable; without a reference empty."""
    metrics: Mapping[str, Tensor]
    """Sums over the pairs, of what every loss reports."""

    def means(self, of: Tensor) -> Tensor:
        """Sums over answers [P, 2] as means over their tokens."""
        return of / self.tokens

    def parts(self, losses: Tensor, rewards: Tensor) -> LossParts:
        """The losses [P] added up, and what they and the answers' rewards [P, 2] say.

        `reward_accuracy` is the share of pairs whose chosen answer has the higher reward.
        """
        chosen, rejected = rewards.detach().unbind(1)
        told = {
            "reward_accuracy": (chosen > rejected).to(chosen.dtype).sum(),
            "reward_margin": (chosen - rejected).sum(),
        }
        return LossParts(
            sum=losses.sum().unsqueeze(0),
            count=losses.new_full((1,), float(len(losses))),
            metrics={**told, **self.metrics},
        )


def pairs_of(forward: Forward, batch: RaggedBatch, reference: str | None = None) -> Pairs:
    """The pairs of a batch; with a reference where `reference`, the objective's name, is given.

    Raises InputError when there is no reference because training changes the base itself.
    """
    if len(batch.lengths) % 2:
        raise ValueError(f"expected pairs of sequences, got {len(batch.lengths)} of them")
    if reference is None:
        logps, tokens = sums_by_sequence(losses_of_trained(forward, batch).neg(), batch)
        return _pairs(logps, tokens, logps.new_zeros(0), {})
    ours, theirs = log_probabilities(forward, batch, reference)
    logps, tokens = sums_by_sequence(ours, batch)
    ratios, _ = sums_by_sequence(ours - theirs, batch)
    apart = (theirs - ours).detach()
    kl, _ = sums_by_sequence(apart.exp() - 1 - apart, batch)
    return _pairs(logps, tokens, ratios, {"kl": kl.sum() / 2})


def _pairs(logps: Tensor, tokens: Tensor, ratios: Tensor, told: dict[str, Tensor]) -> Pairs:
    """The pairs of sequences one after another, from sums by sequence."""
    named = {"log_ratio": ratios, "log_probability": logps, "tokens": tokens}
    for name, values in named.items():
        if values.numel():
            chosen, rejected = values.detach().view(-1, 2).sum(0)
            told |= {f"chosen_{name}": chosen, f"rejected_{name}": rejected}
    return Pairs(logps=logps.view(-1, 2), tokens=tokens.view(-1, 2), log_ratios=ratios.view(-1, 2), metrics=told)


def log_probabilities(forward: Forward, batch: RaggedBatch, objective: str) -> tuple[Tensor, Tensor]:
    """The log-probability of each trained token [K]: under the adapter, differentiable, and under the reference.

    Raises InputError when there is no reference because training changes the base itself.
    """
    _reference.check(forward, objective)
    with torch.no_grad():
        theirs = losses_of_trained(forward, batch.with_adapter(NO_ADAPTER)).neg()
    return losses_of_trained(forward, batch).neg(), theirs


def sums_by_sequence(of_trained: Tensor, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """Values of trained tokens [K], added up by sequence [N]; and how many each sequence has [N]."""
    sequence = batch.sequence[batch.trained]
    zeros = of_trained.new_zeros(len(batch.lengths))
    return zeros.index_add(0, sequence, of_trained), zeros.index_add(0, sequence, torch.ones_like(of_trained).detach())


def preferred(margins: Tensor, label_smoothing: float) -> Tensor:
    """−log σ(margin), as if the share `label_smoothing` of the labels were the wrong way round."""
    right = functional.logsigmoid(margins)
    if not label_smoothing:
        return -right
    return -(1 - label_smoothing) * right - label_smoothing * functional.logsigmoid(-margins)
