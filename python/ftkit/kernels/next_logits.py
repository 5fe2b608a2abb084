"""A whole step of serving: the logits after some tokens of a batch whose sequences continue in a cache of pages.

    logits = head(decoder(batch))[rows]

The `fused` backend hands the embedded tokens to the core and gets logits back: layers, last norm and head in one call,
where `decoder_layers` would leave the norm and the head to calls of their own.
"""

from typing import Any

from torch import Tensor

from ftkit.kernels import operation
from ftkit.kernels.decoder_layers import supports, together


@operation
def next_logits(batch: Any, rows: Tensor, cache: Any, model: Any) -> Tensor:
    """A batch, rows of its stream i32 [R] (rising, on the CPU), its cache and the decoder to logits [R, vocabulary]."""
    hidden, routes = model(batch, cache), batch.routes  # [T, d]
    if len(rows) < len(hidden):
        hidden, routes = hidden[rows.long().to(hidden.device)], routes.take(rows.tolist())  # [R, d]
    logits: Tensor = model.head(hidden, routes)
    return logits


def _supports(batch: Any, rows: Tensor, cache: Any, model: Any) -> bool:  # noqa: ARG001
    layers = together(model, batch) if supports(model.dtype, model.device, batch, cache, model) else None
    return layers is not None and layers.has_head


@next_logits.backend("fused", _supports)
def _run(batch: Any, rows: Tensor, cache: Any, model: Any) -> Tensor:
    """One call into the core."""
    x = model.embed_tokens(batch.tokens, batch.routes)
    cos, sin = model.rotary(batch.positions, x.dtype)
    layers = model._fused.layers[None]  # which `_supports` has just looked at
    logits: Tensor = x.new_empty(len(rows), model.config.vocab_size)
    places = (batch.positions, batch.cu_seqlens, batch.block_table.contiguous())
    layers.forward(x, cos, sin, *places, cache.pages, list(batch.routes.spans), (rows, logits))
    return logits
