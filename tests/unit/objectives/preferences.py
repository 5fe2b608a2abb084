"""A model whose log-probabilities a test decides, and pairs of ragged lengths for it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.nn.batch import NO_ADAPTER, RaggedBatch
from ftkit.nn.routes import Routes

VOCABULARY = 7


@dataclass
class Size:
    vocab_size: int = VOCABULARY


class Given:
    """Logits by the token before, apart for the adapter and for the reference; the head changes nothing."""

    def __init__(self, table: Tensor, reference: Tensor | None = None) -> None:
        self.table = table
        self.reference = table.detach().clone() if reference is None else reference
        self.lm_head = nn.Identity()
        self.config: Any = Size(table.shape[1])

    def __call__(self, batch: RaggedBatch) -> Tensor:
        bare = torch.tensor(batch.adapters)[batch.sequence] == NO_ADAPTER
        places = batch.tokens.long()
        return torch.where(bare.unsqueeze(1), self.reference[places], self.table[places])

    def head(self, hidden: Tensor, routes: Routes | None = None) -> Tensor:  # noqa: ARG002
        return hidden


def random_model(seed: int = 0) -> Given:
    """Random logits for both, the policy's with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(2, VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
    return Given(tables[0].requires_grad_(), tables[1])


Answer = tuple[list[int], list[int]]
"""A prompt's tokens and an answer's."""


def answers(count: int, seed: int = 0) -> list[Answer]:
    """Pairs one after another, chosen first: one prompt, two answers of 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def some(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    found = []
    for _ in range(count):
        prompt = some(1, 4)
        found += [(prompt, some(1, 6)), (prompt, some(1, 6))]
    return found


def packed(given: list[Answer], **more: Any) -> RaggedBatch:
    """The answers as a batch that trains on them, for adapter 0."""
    sequences = [prompt + answer for prompt, answer in given]
    targets = [[-100] * (len(prompt) - 1) + answer + [-100] for prompt, answer in given]
    return RaggedBatch.pack(sequences, targets=targets, adapter=0, **more)


def logps(table: Tensor, given: list[Answer]) -> list[Tensor]:
    """The log-probability of each answer's tokens, one tensor an answer: what a test holds a loss against."""
    scores = torch.log_softmax(table, -1)
    found = []
    for prompt, answer in given:
        before = [prompt[-1], *answer[:-1]]
        found.append(scores[torch.tensor(before), torch.tensor(answer)])
    return found
