"""Perplexity: exp of the mean loss over the trained tokens of a dataset; with another model, the divergence from it.

perplexity = exp(−1/K · Σ log p(tᵢ | t₍<ᵢ₎))        KL(against ‖ model) at the same positions
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftkit import adapters, data
from ftkit.config import DataConfig
from ftkit.errors import InputError
from ftkit.models import LoadedModel
from ftkit.nn.batch import NO_ADAPTER, RaggedBatch

_ADAPTER = 0
_CHUNK_ROWS = 256
"""Positions whose logits are in memory at once."""


def evaluate(
    loaded: LoadedModel, adapter: Path | None, data_path: Path | None, against: LoadedModel | None
) -> dict[str, Any]:
    """Perplexity over the rows of `data_path`, all answers (or texts) counted, in rows of at most 1,024 tokens."""
    if data_path is None:
        raise InputError("--data: expected a dataset, got none")
    if adapter is not None:
        adapters.load(loaded.model, adapter, _ADAPTER)
    number = NO_ADAPTER if adapter is None else _ADAPTER
    config = DataConfig(path=str(data_path))
    dataset, _ = data.prepare(config, loaded.tokenizer, loaded.template, seed=0)
    loss, count, divergence, largest, same = 0.0, 0, 0.0, 0.0, 0
    for batch in dataset.batches(1, passes=1):
        for mine, others, targets in _chunks(loaded, number, against, batch):
            loss -= float(mine.gather(1, targets.unsqueeze(1)).sum())
            count += len(targets)
            if others is not None:
                found = (others.exp() * (others - mine)).sum(-1).clamp(min=0)
                divergence += float(found.sum())
                largest = max(largest, float(found.max()))
                same += int((others.argmax(-1) == mine.argmax(-1)).sum())
    table: dict[str, Any] = {"perplexity": math.exp(loss / count), "tokens": count}
    if against is not None:
        table |= {"kl_mean": divergence / count, "kl_max": largest, "top1": same / count}
    return table


@torch.inference_mode()
def _chunks(
    loaded: LoadedModel, number: int, against: LoadedModel | None, batch: RaggedBatch
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Log-probabilities [rows, vocabulary] of both models and the targets [rows], for the trained positions."""
    assert batch.targets is not None
    rows = batch.trained
    targets = batch.targets.index_select(0, rows).long()
    asked = [(loaded, batch.with_adapter(number))] + ([(against, batch.with_adapter(NO_ADAPTER))] if against else [])
    hidden = [
        (model, given.routes.take(rows.tolist()), model.model(given).index_select(0, rows)) for model, given in asked
    ]
    found = []
    for begin in range(0, len(rows), _CHUNK_ROWS):
        end = min(begin + _CHUNK_ROWS, len(rows))
        parts = [
            model.model.head(states[begin:end], routes.take(range(begin, end))).double().log_softmax(-1)
            for model, routes, states in hidden
        ]
        found.append((parts[0], parts[1] if against else None, targets[begin:end]))
    return found
