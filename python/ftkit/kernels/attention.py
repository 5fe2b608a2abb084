"""Causal attention inside each sequence of a ragged batch.

For token t of a sequence, over the tokens s ≤ t of the same sequence (s > t − window where there is a window):

    y_t = Σ_s softmax_s(scale · q_t · k_s) v_s

Query head h reads key and value head h // (heads / key_value_heads). No token sees another sequence.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ftkit.kernels import operation


@operation
def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, scale: float, window: int | None = None
) -> Tensor:
    """q [T, heads, head_dim], k and v [T, key_value_heads, head_dim] to q's shape.

    `lengths` are those of the sequences, in order, and sum to T. A window counts the token itself.
    The softmax is computed in float32 at least.
    """
    group = q.shape[1] // k.shape[1]
    outputs = []
    for queries, keys, values in _sequences(q, k, v, lengths):
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
        scores = scale * (queries @ keys.transpose(1, 2))  # [heads, n, n]
        scores = scores.masked_fill(~visible(queries.shape[1], window, q.device), float("-inf"))
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        outputs.append((torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ values).transpose(0, 1))
    return torch.cat(outputs)


@attention.backend("sdpa", lambda q, *_, **__: q.device.type in ("cpu", "cuda"))
def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, scale: float, window: int | None = None
) -> Tensor:
    """torch's scaled_dot_product_attention, a sequence at a time."""
    outputs = []
    for queries, keys, values in _sequences(q, k, v, lengths):
        count = queries.shape[1]
        limited = window is not None and count > window
        output = functional.scaled_dot_product_attention(
            queries.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=visible(count, window, q.device) if limited else None,
            is_causal=not limited,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(output.squeeze(0).transpose(0, 1))  # [n, heads, head_dim]
    return torch.cat(outputs)


def visible(count: int, window: int | None, device: torch.device) -> Tensor:
    """The mask [count, count] of a sequence: may the token of the row see the token of the column?"""
    mask = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _sequences(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of each sequence that has tokens, each [heads, n, head_dim]."""
    parts = [[part.transpose(0, 1) for part in x.split(lengths)] for x in (q, k, v)]
    return [(a, b, c) for a, b, c in zip(*parts, strict=True) if a.shape[1]]
