"""Parity: whether a written model answers as the live one; figures over fixed texts, and the bounds of each type.

    KL(live ‖ exported) at every position, top-1 agreement, and greedy continuations that are the same token for token

A type that keeps the weights must keep the answers; one with few bits may move them as far as its rounding does, which
was measured on small models (large ones move less): the bounds are there to catch what is wrong, not what is coarse.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftkit import adapters
from ftkit._core import Tokenizer
from ftkit.errors import InputError
from ftkit.kernels.next_logits import next_logits
from ftkit.models import LoadedModel
from ftkit.nn.batch import NO_ADAPTER, RaggedBatch
from ftkit.nn.paged_cache import PagedCache

TEXTS = (
    "The river rises in the mountains, crosses three valleys, and reaches the sea after nine hundred kilometres.",
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n",
    "Question: what is the capital of France, and which river runs through it?\nAnswer: The capital is Paris, and",
    "Die Bibliothek öffnet um neun Uhr; wer früher kommt, wartet im Hof. 图书馆九点开门。 "
    "La bibliothèque ouvre à neuf heures.",
    "1. Preheat the oven to 180 °C.\n2. Mix 250 g of flour with 3 eggs.\n3. Bake for 40 minutes.\n",
    "She asked him why he had come back, and for a long time he said nothing at all.",
)
PROMPTS = ("The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time, there was")
_GREEDY_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How near two models are."""

    kl_mean: float
    kl_max: float
    top1: float
    """Share of positions where both find the same token likeliest."""
    greedy_match: float
    """Share of prompts whose greedy continuations are the same."""
    passed: bool

    def sentence(self) -> str:
        """The figures for people."""
        return (
            f"KL {self.kl_mean:.3g} (mean), {self.kl_max:.3g} (max); top-1 {self.top1:.3f}; "
            f"greedy {self.greedy_match:.2f}"
        )


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far an export may be from the live model."""

    kl_mean: float
    top1: float


_BOUNDS = {
    "f32": Bounds(kl_mean=1e-6, top1=0.99),
    "f16": Bounds(kl_mean=1e-4, top1=0.98),
    "bf16": Bounds(kl_mean=2e-3, top1=0.95),
    "q8_0": Bounds(kl_mean=5e-3, top1=0.93),
    "q6_k": Bounds(kl_mean=2e-2, top1=0.9),
    "q5": Bounds(kl_mean=0.1, top1=0.8),
    "q4": Bounds(kl_mean=1.0, top1=0.5),
    "iq4": Bounds(kl_mean=1.0, top1=0.5),
    "nf4": Bounds(kl_mean=1.0, top1=0.5),
    "int4": Bounds(kl_mean=1.0, top1=0.5),
    "fp4": Bounds(kl_mean=1.5, top1=0.4),
    "q3": Bounds(kl_mean=1.5, top1=0.4),
    "q2": Bounds(kl_mean=4.0, top1=0.2),
}


def bounds(kind: str) -> Bounds:
    """The bounds of a type, by its name or the beginning of it."""
    return next(bound for name, bound in _BOUNDS.items() if kind.startswith(name))


def evaluate(
    loaded: LoadedModel, adapter: Path | None, data: Path | None, against: LoadedModel | None
) -> dict[str, Any]:
    """How near the model is to `against`, by the bounds of bf16."""
    if against is None or data is not None:
        raise InputError("parity: expected --against MODEL and no --data, since its texts are its own")
    if adapter is not None:
        adapters.load(loaded.model, adapter, 0)
    return asdict(compare(against, loaded, bounds("bf16")))


def compare(live: LoadedModel, exported: LoadedModel, allowed: Bounds) -> Parity:
    """The figures, over `TEXTS` and `PROMPTS`; each model under its adapter 0 where it has one."""
    return figures(answers(live, live.tokenizer), answers(exported, live.tokenizer), allowed)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says to `TEXTS` and `PROMPTS`."""

    log_probabilities: Tensor
    """Of each next token, float64 [T, vocabulary], the texts one after the other."""
    continuations: list[list[int]]
    """The prompts with the likeliest tokens after them."""


def answers(loaded: LoadedModel, tokenizer: Tokenizer, *, adapted: bool = True) -> Answers:
    """What the model says, under its adapter 0 where it has one and `adapted`; texts become tokens by `tokenizer`."""
    adapter = 0 if adapted and 0 in loaded.model.attached else NO_ADAPTER
    texts, prompts = ([tokenizer.encode_prompt(text) for text in asked] for asked in (TEXTS, PROMPTS))
    return Answers(
        log_probabilities=_logits(loaded, texts, adapter).double().log_softmax(-1),
        continuations=_greedy(loaded, prompts, adapter),
    )


def figures(live: Answers, other: Answers, allowed: Bounds) -> Parity:
    """How near the other answers are to the live ones."""
    expected, got = live.log_probabilities, other.log_probabilities
    divergence = (expected.exp() * (expected - got)).sum(-1).clamp(min=0)
    top1 = float((expected.argmax(-1) == got.argmax(-1)).double().mean())
    same = [a == b for a, b in zip(live.continuations, other.continuations, strict=True)]
    mean = float(divergence.mean())
    return Parity(
        kl_mean=mean,
        kl_max=float(divergence.max()),
        top1=top1,
        greedy_match=sum(same) / len(same),
        passed=mean <= allowed.kl_mean and top1 >= allowed.top1,
    )


def _logits(loaded: LoadedModel, texts: list[list[int]], adapter: int) -> Tensor:
    """Logits [T, vocabulary] with the texts side by side in one batch."""
    batch = RaggedBatch.pack(texts, adapter=adapter, device=loaded.model.device)
    with torch.inference_mode():
        logits: Tensor = loaded.model.head(loaded.model(batch), batch.routes)
    return logits


def _greedy(loaded: LoadedModel, prompts: list[list[int]], adapter: int) -> list[list[int]]:
    """Each prompt with the likeliest tokens after it."""
    model, config = loaded.model, loaded.config
    tokens = max(map(len, prompts)) + _GREEDY_TOKENS
    cache = PagedCache(
        layers=config.layers,
        key_value_heads=config.key_value_heads,
        head_dim=config.head_dim,
        page_count=len(prompts),
        block_tokens=tokens,  # a sequence has a page of its own
        dtype=model.dtype,
        device=model.device,
    )
    pages = torch.arange(len(prompts), dtype=torch.int32, device=model.device)[:, None]
    rows, new, starts = [list(prompt) for prompt in prompts], prompts, [0] * len(prompts)
    for _ in range(_GREEDY_TOKENS):
        packed = RaggedBatch.pack(new, adapter=adapter, starts=starts, device=model.device)
        batch = replace(packed, block_table=pages)
        with torch.inference_mode():
            logits = next_logits(batch, batch.last.cpu().int(), cache, model)
        starts, new = [len(row) for row in rows], [[token] for token in logits.argmax(-1).tolist()]
        for row, token in zip(rows, new, strict=True):
            row += token
    return rows
