"""Kahneman-Tversky optimization: single answers that are wanted or not, without a better or worse one beside them.

    wanted:    w_d (1 − σ(β (h − z)))          h = log π(y | x) − log π_ref(y | x)
    unwanted:  w_u (1 − σ(β (z − h)))          z = max(0, mean of h over prompts with other prompts' answers)
    loss = mean over answers

z says how far the policy is from the reference at all: an answer is only good as far as it gained more than that.
It is a statistic of several answers, so those that share one are fixed by the data: groups of 8 answers of neighbouring
rows stay in one batch, whatever the packing and the accumulation, and each group has its own z, from each prompt with
the answer two places on (the next row's, where rows are pairs). It has no gradient.

Rows are `prompt`, `completion` and `label` (true: wanted), or pairs, of which both answers are taken for themselves.
Choose it where there are thumbs up and down instead of comparisons. With unequal numbers of them, the weights should
make up for it: wanted times w_d between 1 and 4/3 of unwanted times w_u. A step costs two more forward passes than
DPO's.

Source: Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, 2024, arXiv 2402.01306.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ftkit.config import option
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import Forward, LossParts
from ftkit.objectives._preference import log_probabilities, sums_by_sequence

PAIRS = True
LABELLED = True
TOGETHER = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """KTO's settings."""

    beta: float = option(0.1, "how dear it is to leave the reference", above=0)
    desirable_weight: float = option(1.0, "w_d: of answers that are wanted", at_least=0)
    undesirable_weight: float = option(1.0, "w_u: of answers that are not", at_least=0)


def loss(forward: Forward, batch: RaggedBatch, config: Config) -> LossParts:
    """The summed loss and the number of answers. Raises InputError when training changes the base itself."""
    with torch.no_grad():
        crossed = mismatched(batch)
        apart, _ = sums_by_sequence(torch.sub(*log_probabilities(forward, crossed, "kto")), crossed)
        z = _means_by_group(apart, batch).clamp(min=0)  # [N]
    ours, theirs = log_probabilities(forward, batch, "kto")
    ratios, tokens = sums_by_sequence(ours - theirs, batch)
    unwanted = torch.zeros_like(z) if batch.task is None else batch.task.to(z.dtype)
    leads = (ratios - z) * (1 - 2 * unwanted)
    weights = config.desirable_weight * (1 - unwanted) + config.undesirable_weight * unwanted
    losses = weights * (1 - torch.sigmoid(config.beta * leads))
    leads = leads.detach()
    told = {"reward_accuracy": (leads > 0).to(z.dtype).sum(), "reward_margin": config.beta * leads.sum(), "kl": z.sum()}
    logps, _ = sums_by_sequence(ours.detach(), batch)
    for label, mine in (("chosen", 1 - unwanted), ("rejected", unwanted)):
        for name, values in (("log_ratio", ratios.detach()), ("log_probability", logps), ("tokens", tokens)):
            told[f"{label}_{name}"] = torch.stack([(values * mine).sum(), mine.sum()])
    return LossParts(sum=losses.sum().unsqueeze(0), count=losses.new_full((1,), float(len(losses))), metrics=told)


def mismatched(batch: RaggedBatch) -> RaggedBatch:
    """Each sequence's prompt with the answer of the one two places on in its group, which is a circle.

    A prompt ends where the first trained token comes. In a group of two, the answers change places; alone, one stays.
    """
    begins = [0]
    for length in batch.lengths:
        begins.append(begins[-1] + length)
    trained = batch.host_trained if batch.host_trained is not None else batch.trained.tolist()
    answers = begins[1:]  # where each sequence's answer begins: at its end when it has none
    sequence = len(batch.lengths) - 1
    for place in reversed(trained):
        while place < begins[sequence]:
            sequence -= 1
        answers[sequence] = place + 1
    places: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for one, other in enumerate(_partners(batch.groups)):
        prompt, answer = range(begins[one], answers[one]), range(answers[other], begins[other + 1])
        places += [*prompt, *answer]
        targets += [*prompt[:-1], answers[other] - 1, *answer]
        lengths.append(len(prompt) + len(answer))
    assert batch.targets is not None
    known, device = set(trained), batch.tokens.device
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return replace(
        batch,
        tokens=batch.tokens[torch.tensor(places).to(device)],
        targets=batch.targets[torch.tensor(targets).to(device)],
        positions=torch.tensor([at for length in lengths for at in range(length)], dtype=torch.int32).to(device),
        cu_seqlens=ends.to(device),
        weights=None,
        host_lengths=tuple(lengths),
        host_trained=tuple(place for place, target in enumerate(targets) if target in known),
    )


def _partners(groups: tuple[int, ...]) -> list[int]:
    """For each sequence the one whose answer it gets."""
    members: dict[int, list[int]] = {}
    for sequence, group in enumerate(groups):
        members.setdefault(group, []).append(sequence)
    found = list(range(len(groups)))
    for inside in members.values():
        for place, sequence in enumerate(inside):
            found[sequence] = inside[(place + (2 if len(inside) > 2 else 1)) % len(inside)]
    return found


def _means_by_group(values: Tensor, batch: RaggedBatch) -> Tensor:
    """Each sequence's group's mean of values [N]."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(batch.groups))}
    group = torch.tensor([numbers[group] for group in batch.groups]).to(values.device)
    zeros = values.new_zeros(len(numbers))
    means = zeros.index_add(0, group, values) / zeros.index_add(0, group, torch.ones_like(values))
    return means[group]
