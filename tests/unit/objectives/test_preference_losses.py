"""Losses of preferences: trl's own numbers and gradients on random log-probabilities, and the optima of the papers."""

import contextlib
import math
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from preferences import VOCABULARY, Answer, Given, answers, logps, packed, random_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import dpo_trainer, kto_trainer

from ftkit import plugins
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import LossParts
from ftkit.objectives.kto import mismatched
from ftkit.objectives.orpo import log_odds

pytestmark = pytest.mark.unit

NAMES = ("dpo", "lc_dpo", "ipo", "simpo", "cpo", "orpo")
WITH_REFERENCE = ("dpo", "lc_dpo", "ipo")


def loss_of(name: str, model: Given, batch: RaggedBatch, **options: Any) -> LossParts:
    objective = plugins.load("objectives", name)
    found: LossParts = objective.loss(model, batch, objective.Config(**options))
    return found


def mean(parts: LossParts) -> Tensor:
    return (parts.sum / parts.count).sum()


def value(parts: LossParts) -> float:
    return float(mean(parts).detach())


# What trl computes: its own code, given the log-probabilities of the same random model.


def _trl_dpo(model: Given, given: list[Answer], **settings: Any) -> Tensor:
    """DPOTrainer's loss; trl's batch has all chosen answers first."""
    ordered = [*given[::2], *given[1::2]]
    rows = [torch.tensor(prompt + answer) for prompt, answer in ordered]
    masks = [torch.tensor([0] * len(prompt) + [1] * len(answer)) for prompt, answer in ordered]
    inputs = {"input_ids": pad_sequence(rows, True), "completion_mask": pad_sequence(masks, True)}
    inputs["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], True)
    shape = (len(rows), inputs["input_ids"].shape[1] - 1)

    padded = [_padded(table, ordered, shape[1]) for table in (model.table, model.reference)]
    trainer = types.SimpleNamespace(
        model=_Outputs(padded[0]),
        ref_model=_Outputs(padded[1]),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list)},
        **_TRL_TRAINER,
    )
    vars(trainer).update(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_trainer, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext())
        found: Tensor = dpo_trainer.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return found


def _padded(table: Tensor, given: list[Answer], width: int) -> Tensor:
    """The answers' log-probabilities [rows, width] where trl has them, zeros elsewhere."""
    rows = []
    for (prompt, answer), each in zip(given, logps(table, given), strict=True):
        before, after = len(prompt) - 1, width + 1 - len(prompt) - len(answer)
        rows.append(torch.nn.functional.pad(each, (before, after)))
    return torch.stack(rows)


_TRL_TRAINER: dict[str, Any] = {
    "accelerator": types.SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    ),
    "args": types.SimpleNamespace(gradient_checkpointing_kwargs=None),
    "aux_loss_enabled": False,
    "precompute_ref_logps": False,
    "_total_train_tokens": 0,
    "_tp_size": 1,
}


class _Outputs(torch.nn.Module):
    """trl's model: it has the log-probabilities already [rows, tokens], and nothing else to say."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        nothing = torch.zeros(log_probs.shape)
        self.told = types.SimpleNamespace(
            log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    def forward(self, **_: Any) -> Any:
        return self.told


def _trl_cpo(model: Given, given: list[Answer], average: bool, **settings: Any) -> Tensor:
    """CPOTrainer's preference loss, without the supervised one."""
    chosen, rejected = _sums(model, given, average)
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace(device="cpu"), alpha=0.0, label_smoothing=0.0)
    vars(trainer).update(settings)
    found: Tensor = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()
    return found


def _trl_orpo(model: Given, given: list[Answer], beta: float) -> Tensor:
    """ORPOTrainer's odds' ratio, and the supervised loss a pair."""
    chosen, rejected = _sums(model, given, True)
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace(device="cpu"), beta=beta)
    odds: Tensor = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    return -odds.mean() - chosen.mean()


def _sums(model: Given, given: list[Answer], average: bool) -> tuple[Tensor, Tensor]:
    each = torch.stack([one.mean() if average else one.sum() for one in logps(model.table, given)])
    return each[::2], each[1::2]


ORACLES: dict[str, tuple[str, dict[str, Any], Callable[[Given, list[Answer]], Tensor]]] = {
    "dpo": ("dpo", {"beta": 0.3}, lambda m, g: _trl_dpo(m, g, loss_types=["sigmoid"], beta=0.3)),
    "dpo by length": (
        "dpo",
        {"beta": 2.0, "normalise_by_length": True},
        lambda m, g: _trl_dpo(m, g, loss_types=["sigmoid_norm"], beta=2.0),
    ),
    "lc_dpo without length": (
        "lc_dpo",
        {"beta": 0.3, "alpha": 0.0},
        lambda m, g: _trl_dpo(m, g, loss_types=["sigmoid"], beta=0.3),
    ),
    "ipo": ("ipo", {"tau": 0.2}, lambda m, g: _trl_dpo(m, g, loss_types=["ipo"], beta=0.2)),
    "simpo": (
        "simpo",
        {"beta": 2.5, "gamma": 0.7, "label_smoothing": 0.1},
        lambda m, g: _trl_cpo(m, g, True, loss_type="simpo", beta=2.5, simpo_gamma=0.7, label_smoothing=0.1),
    ),
    "cpo": (
        "cpo",
        {"beta": 0.2, "alpha": 0.0, "label_smoothing": 0.2},
        lambda m, g: _trl_cpo(m, g, False, loss_type="sigmoid", beta=0.2, label_smoothing=0.2),
    ),
    "cpo, supervised": (
        "cpo",
        {"beta": 0.2, "alpha": 0.7},
        lambda m, g: _trl_cpo(m, g, False, loss_type="sigmoid", beta=0.2) - 0.7 * _sums(m, g, True)[0].mean(),
    ),
    "orpo": ("orpo", {"odds_weight": 0.4}, lambda m, g: _trl_orpo(m, g, 0.4)),
}


@pytest.mark.parametrize("case", ORACLES)
def test_losses_and_gradients_are_those_of_trl(case: str) -> None:
    name, options, theirs = ORACLES[case]
    for seed in range(3):
        model, given = random_model(seed), answers(5, seed)
        ours, expected = mean(loss_of(name, model, packed(given), **options)), theirs(model, given)
        torch.testing.assert_close(ours.float(), expected.float(), rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(one, model.table)[0] for one in (ours, expected)]
        assert gradients[0].abs().max() > 1e-4
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_smoothing_mixes_in_the_labels_the_wrong_way_round() -> None:
    model, given = random_model(), answers(5)
    turned = [answer for pair in zip(given[1::2], given[::2], strict=True) for answer in pair]
    for name, options in (("dpo", {}), ("lc_dpo", {"alpha": 0.1})):
        right, wrong = (mean(loss_of(name, model, packed(each), **options)) for each in (given, turned))
        smoothed = mean(loss_of(name, model, packed(given), **options, label_smoothing=0.2))
        torch.testing.assert_close(smoothed, 0.8 * right + 0.2 * wrong)


def test_a_length_that_raters_like_counts_for_nothing() -> None:
    model, given = random_model(), answers(4)
    pairs = list(zip(given[::2], given[1::2], strict=True))
    ratios = [(a - b).sum() for a, b in zip(logps(model.table, given), logps(model.reference, given), strict=True)]
    expected = sum(
        -torch.nn.functional.logsigmoid(0.3 * (ratios[2 * i] - ratios[2 * i + 1]) + 0.2 * (len(a[1]) - len(b[1])))
        for i, (a, b) in enumerate(pairs)
    )
    ours = loss_of("lc_dpo", model, packed(given), beta=0.3, alpha=0.2)
    torch.testing.assert_close(ours.sum.sum(), expected)


def test_where_policy_and_reference_agree() -> None:
    """Losses are known, and so is what the chosen answer's log-probability is worth."""
    model, given = random_model(), answers(6)
    model.reference = model.table.detach().clone()
    assert value(loss_of("dpo", model, packed(given))) == pytest.approx(math.log(2), abs=1e-12)
    assert value(loss_of("ipo", model, packed(given), tau=0.2)) == pytest.approx(1 / (4 * 0.2**2), abs=1e-10)
    parts = loss_of("dpo", model, packed(given[:2]), beta=0.3)
    slope = torch.autograd.grad(parts.sum.sum(), model.table)[0]
    chosen, rejected = (torch.autograd.grad(logps(model.table, [one])[0].sum(), model.table)[0] for one in given[:2])
    torch.testing.assert_close(slope, -0.15 * (chosen - rejected))
    for name in ("kl", "chosen_log_ratio", "rejected_log_ratio", "reward_margin"):
        assert float(parts.metrics[name]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_order_and_packing_change_nothing(name: str) -> None:
    model, given = random_model(), answers(6)
    together = loss_of(name, model, packed(given))
    turned = [answer for pair in range(5, -1, -1) for answer in given[2 * pair : 2 * pair + 2]]
    apart = [loss_of(name, model, packed(given[2 * pair : 2 * pair + 2])) for pair in range(6)]
    assert float(together.count) == 6
    for other in (loss_of(name, model, packed(turned)).sum, sum(parts.sum for parts in apart)):
        torch.testing.assert_close(together.sum, other, rtol=1e-12, atol=1e-12)
    for metric, value in together.metrics.items():
        torch.testing.assert_close(value, torch.stack([parts.metrics[metric] for parts in apart]).sum())


@pytest.mark.parametrize("name", NAMES)
def test_metrics_say_what_happens(name: str) -> None:
    model, given = random_model(), answers(6)
    metrics = loss_of(name, model, packed(given)).metrics
    assert list(metrics)[:2] == ["reward_accuracy", "reward_margin"]  # those a progress line has room for
    assert not any(value.requires_grad for value in metrics.values())
    ours = [one.detach().sum() for one in logps(model.table, given)]
    torch.testing.assert_close(metrics["chosen_log_probability"], torch.stack(ours[::2]).sum())
    torch.testing.assert_close(metrics["rejected_log_probability"], torch.stack(ours[1::2]).sum())
    assert float(metrics["chosen_tokens"]) == sum(len(answer) for _, answer in given[::2])
    assert float(metrics["rejected_tokens"]) == sum(len(answer) for _, answer in given[1::2])
    assert ("kl" in metrics) == (name in WITH_REFERENCE)
    if name in WITH_REFERENCE:
        apart = [
            (a - b).detach() for a, b in zip(*(logps(t, given) for t in (model.table, model.reference)), strict=True)
        ]
        torch.testing.assert_close(metrics["chosen_log_ratio"], sum(one.sum() for one in apart[::2]))
        torch.testing.assert_close(metrics["rejected_log_ratio"], sum(one.sum() for one in apart[1::2]))
        torch.testing.assert_close(metrics["kl"], sum((-one).exp().sum() - len(one) + one.sum() for one in apart) / 2)
    if name == "dpo":
        leads = [(apart[i].sum() > apart[i + 1].sum()).double() for i in range(0, 12, 2)]
        torch.testing.assert_close(metrics["reward_accuracy"], torch.stack(leads).sum())
        margin = 0.1 * (metrics["chosen_log_ratio"] - metrics["rejected_log_ratio"])
        torch.testing.assert_close(metrics["reward_margin"], margin)


def test_a_half_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="expected pairs of sequences, got 3"):
        loss_of("dpo", random_model(), packed(answers(2)[:3]))


def test_odds_of_a_certain_answer_are_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        certain = torch.tensor([-1e-8, 0.0, -1e-4, -0.69, -0.7, -30.0, -200.0], dtype=dtype, requires_grad=True)
        odds = log_odds(certain)
        (slope,) = torch.autograd.grad(odds.sum(), certain)
        assert odds.isfinite().all()
        assert slope.isfinite().all()
        exact = certain.detach().double()[2:]
        expected = exact - torch.log(-torch.expm1(exact))
        torch.testing.assert_close(odds.detach().double()[2:], expected, rtol=1e-6, atol=1e-6)


def _trl_kto(model: Given, given: list[Answer], labels: list[bool], crossed: list[Answer], **settings: Any) -> Tensor:
    """KTOTrainer's loss; it asks its model for the mismatched answers first, then for those of the rows."""

    class Model(torch.nn.Module):
        def __init__(self, table: Tensor) -> None:
            super().__init__()
            self.table = table

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            each = crossed if input_ids.shape[1] == inputs["KL_input_ids"].shape[1] else given
            shape = (len(each), input_ids.shape[1] - 1)
            nothing = torch.zeros(shape)
            return types.SimpleNamespace(
                log_probs=_padded(self.table, each, shape[1]), entropy=nothing, mean_logits=nothing
            )

    inputs: dict[str, Tensor] = {"label": torch.tensor(labels)}
    for prefix, each, longer in (("", given, 0), ("KL_", crossed, 20)):  # apart by their width
        rows = [torch.tensor(prompt + answer) for prompt, answer in each]
        masks = [torch.tensor([0] * len(prompt) + [1] * len(answer)) for prompt, answer in each]
        for name, values in (("input_ids", rows), ("completion_mask", masks), ("attention_mask", rows)):
            inputs[prefix + name] = torch.nn.functional.pad(pad_sequence(values, True), (0, longer))
    trainer = types.SimpleNamespace(
        model=Model(model.table),
        ref_model=Model(model.reference),
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        **_TRL_TRAINER,
    )
    vars(trainer).update(settings)
    trainer._compute_kl_logps = types.MethodType(kto_trainer.KTOTrainer._compute_kl_logps, trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kto_trainer, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext())
        trainer._metrics = {"train": defaultdict(list)}
        found: Tensor = kto_trainer.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return found


def _crossed(given: list[Answer], places: int) -> list[Answer]:
    return [(prompt, given[(at + places) % len(given)][1]) for at, (prompt, _) in enumerate(given)]


@pytest.mark.parametrize(("rows", "paired"), [(4, True), (3, False), (4, False), (1, False)])
def test_kto_is_that_of_trl_in_a_group_with_its_own_mismatched_answers(rows: int, paired: bool) -> None:
    nonzero = 0
    for seed in range(4):
        model, given = random_model(seed), answers(rows, seed)
        given = given if paired or rows == 1 else given[:-1]  # an odd number of single answers
        labels = [at % 2 == 0 for at in range(len(given))] if paired else [at % 3 == 0 for at in range(len(given))]
        crossed = _crossed(given, 2 if len(given) > 2 else 1)
        tasks = [0 if wanted else 1 for wanted in labels]
        batch = packed(given, task=tasks, group=[0] * len(given))
        options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
        parts = loss_of("kto", model, batch, **options)
        expected = _trl_kto(model, given, labels, crossed, **options)
        torch.testing.assert_close(mean(parts), expected, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(one, model.table)[0] for one in (mean(parts), expected)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
        nonzero += float(parts.metrics["kl"]) > 0
    assert nonzero  # z counts, where it isn't cut off at 0


def test_ktos_groups_are_alone_with_their_statistic() -> None:
    """Groups of any sizes in any order, packed or each for itself, give one loss, and one half without a difference."""
    model, given = random_model(1), answers(7)
    sizes, tasks, start, apart = (4, 6, 2, 2), [0, 1] * 7, 0, []
    for size in sizes:
        mine = slice(start, start + size)
        apart.append(loss_of("kto", model, packed(given[mine], task=tasks[mine], group=[5] * size)))
        start += size
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    together = loss_of("kto", model, packed(given, task=tasks, group=numbers))
    turned = loss_of("kto", model, packed(given[4:] + given[:4], task=tasks, group=numbers[4:] + numbers[:4]))
    for other in (turned.sum, torch.stack([parts.sum for parts in apart]).sum(0)):
        torch.testing.assert_close(together.sum, other, rtol=1e-12, atol=1e-12)
    assert float(together.count) == 14
    for name, total in together.metrics.items():
        torch.testing.assert_close(total, torch.stack([parts.metrics[name] for parts in apart]).sum(0))
    model.reference = model.table.detach().clone()
    assert value(loss_of("kto", model, packed(given, task=tasks, group=numbers))) == pytest.approx(0.5, abs=1e-12)


def test_mismatched_answers_keep_their_targets() -> None:
    given: list[Answer] = [([1, 2], [3]), ([1, 2], [4, 5]), ([0], [6, 6, 6]), ([0], [2])]
    crossed = mismatched(packed(given, group=[0] * 4))
    expected = packed(_crossed(given, 2), group=[0] * 4)
    assert (crossed.lengths, crossed.host_trained) == (expected.lengths, expected.host_trained)
    for name in ("tokens", "targets", "positions", "cu_seqlens"):
        assert torch.equal(getattr(crossed, name), getattr(expected, name)), name


# Optima: five answers, preferences of a known reward by Bradley and Terry's model.


def _answer(number: int, length: int) -> list[int]:
    """The answer's first token is its number, 1 to 5; the rest follows with certainty."""
    return [number] + [6] * (length - 1)


def _optimum(name: str, reference: Tensor, utilities: Tensor, lengths: list[int], **options: Any) -> Tensor:
    """The policy [5] that has the least loss under all preferences, each with the probability that it is stated."""
    certain = torch.full((VOCABULARY, VOCABULARY), -1e4, dtype=torch.float64)
    certain[1:, 6] = 0

    def model(scores: Tensor) -> Given:
        first = torch.cat([scores.new_full((1,), -1e4), scores, scores.new_full((1,), -1e4)])
        base = torch.cat([reference.new_full((1,), -1e4), reference.log(), reference.new_full((1,), -1e4)])
        return Given(*(torch.cat([row.unsqueeze(0), certain[1:]]) for row in (first, base)))

    scores = reference.log().clone().requires_grad_()
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    batches = [packed([([0], _answer(one + 1, lengths[one])) for one in pair]) for pair in pairs]
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        given = model(scores)
        stated = [torch.sigmoid(utilities[a] - utilities[b]) for a, b in pairs]
        losses = [loss_of(name, given, batch, **options).sum.sum() for batch in batches]
        total = torch.stack([share * loss for share, loss in zip(stated, losses, strict=True)]).sum()
        total.backward()
        return float(total.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return torch.softmax(scores.detach(), 0)


def test_dpo_finds_the_policy_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    reference = torch.softmax(torch.randn(5, generator=generator, dtype=torch.float64), 0)
    found = _optimum("dpo", reference, rewards, [1] * 5, beta=0.5)
    expected = torch.softmax(reference.log() + rewards / 0.5, 0)
    assert float((found - expected).abs().sum() / 2) < 1e-3


def test_lc_dpo_takes_a_liking_for_length_out() -> None:
    """Preferences of reward and length: DPO's answers grow, LC-DPO finds the policy of the reward alone."""
    generator = torch.Generator().manual_seed(2)
    rewards = 0.5 * torch.randn(5, generator=generator, dtype=torch.float64)
    reference, lengths = torch.full((5,), 0.2, dtype=torch.float64), [1, 2, 3, 4, 5]
    utilities = rewards + 0.6 * torch.tensor(lengths, dtype=torch.float64)
    unbiased = torch.softmax(reference.log() + rewards, 0)
    dpo = _optimum("dpo", reference, utilities, lengths, beta=1.0)
    controlled = _optimum("lc_dpo", reference, utilities, lengths, beta=1.0, alpha=0.6)
    assert float((controlled - unbiased).abs().sum() / 2) < 1e-3
    mean_length = [float((policy * torch.tensor(lengths)).sum()) for policy in (unbiased, dpo)]
    assert mean_length[1] > mean_length[0] + 0.5
