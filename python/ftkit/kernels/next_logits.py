"""A whole step of serving: the logits after some tokens of a batch whose sequences continue in a cache of pages.

    logits = head(decoder(batch))[rows]

The `fused` backend is one call into the core, from token ids to logits. The engine makes the same call without Python
where it can.
"""

from typing import Any

import torch
from torch import Tensor

from ftkit.kernels import operation
from ftkit.kernels.decoder_layers import whole_step


@operation
def next_logits(batch: Any, rows: Tensor, cache: Any, model: Any) -> Tensor:
    """A batch, rows of its stream i32 [R] (rising, on the CPU), its cache and the decoder to logits [R, vocabulary]."""
    hidden, routes = model(batch, cache), batch.routes  # [T, d]
    if len(rows) < len(hidden):
        hidden, routes = hidden[rows.long().to(hidden.device)], routes.take(rows.tolist())  # [R, d]
    logits: Tensor = model.head(hidden, routes)
    return logits


def _supports(batch: Any, rows: Tensor, cache: Any, model: Any) -> bool:  # noqa: ARG001
    if torch.is_grad_enabled() or batch.block_table is None:
        return False
    step = whole_step(model, cache)
    return step is not None and step.knows(batch.adapters)


@next_logits.backend("fused", _supports)
def _run(batch: Any, rows: Tensor, cache: Any, model: Any) -> Tensor:
    """One call into the core."""
    step = whole_step(model, cache)
    assert step is not None  # which `_supports` has just looked at
    logits = torch.empty(len(rows), model.config.vocab_size)
    places = (batch.cu_seqlens, batch.adapters, batch.block_table.contiguous())
    step.run(batch.tokens, batch.positions, *places, rows, logits)
    return logits
