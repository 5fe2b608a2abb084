"""Perplexity: exp of the mean loss over the trained tokens of a dataset; with another model, the divergence from it.

perplexity = exp(−1/K · Σ log p(tᵢ | t₍<ᵢ₎))        KL(against ‖ model) at the same positions
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftkit import adapters, data
from ftkit.config import DataConfig
from ftkit.errors import InputError
from ftkit.models import LoadedModel
from ftkit.nn.batch import NO_ADAPTER

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
    mine = log_probabilities(loaded, data_path, NO_ADAPTER if adapter is None else _ADAPTER)
    return summary(mine, None if against is None else log_probabilities(against, data_path))


def log_probabilities(
    loaded: LoadedModel, data_path: Path, adapter: int = NO_ADAPTER
) -> Iterator[tuple[Tensor, Tensor]]:
    """(log-probabilities [positions, vocabulary] in float64, targets [positions]) of a few positions at a time."""
    # what is long is cut in pieces, so that it is counted to its end
    config = DataConfig(path=str(data_path), long_rows="split")
    dataset, _ = data.prepare(config, loaded.tokenizer, loaded.template, seed=0)
    for batch in dataset.batches(1, passes=1):
        assert batch.targets is not None
        rows = batch.trained
        targets = batch.targets.index_select(0, rows).long()
        given = batch.with_adapter(adapter)
        # the mode is the thread's, and would be the reader's too if it were left on at a `yield`
        with torch.inference_mode():
            hidden, routes = loaded.model(given).index_select(0, rows), given.routes.take(rows.tolist())
        for begin in range(0, len(rows), _CHUNK_ROWS):
            end = min(begin + _CHUNK_ROWS, len(rows))
            with torch.inference_mode():
                logits = loaded.model.head(hidden[begin:end], routes.take(range(begin, end)))
                found = logits.double().log_softmax(-1)
            yield found, targets[begin:end]


def summary(
    mine: Iterable[tuple[Tensor, Tensor]], others: Iterable[tuple[Tensor, Tensor]] | None = None
) -> dict[str, Any]:
    """What `log_probabilities` gave, in figures; with those of another model, the divergence from it."""
    loss, count, divergence, largest, same = 0.0, 0, 0.0, 0.0, 0
    pairs = ((part, None) for part in mine) if others is None else zip(mine, others, strict=True)
    for (logs, targets), other in pairs:
        loss -= float(logs.gather(1, targets.unsqueeze(1)).sum())
        count += len(targets)
        if other is not None:
            found = (other[0].exp() * (other[0] - logs)).sum(-1).clamp(min=0)
            divergence += float(found.sum())
            largest = max(largest, float(found.max()))
            same += int((other[0].argmax(-1) == logs.argmax(-1)).sum())
    table: dict[str, Any] = {"perplexity": math.exp(loss / count), "tokens": count}
    if others is not None:
        table |= {"kl_mean": divergence / count, "kl_max": largest, "top1": same / count}
    return table
