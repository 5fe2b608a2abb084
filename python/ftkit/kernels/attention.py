"""Causal attention inside each sequence of a ragged batch.

For token t of a sequence, over the tokens s ≤ t of the same sequence (s > t − window where there is a window):

    y_t = Σ_s softmax_s(scale · q_t · k_s) v_s

Query head h reads key and value head h // (heads / key_value_heads). No token sees another sequence, but for those that
a sequence shares: it then goes on after the first tokens of the last one before it that shares nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.cuda import attention as on_gpu
from ftkit.kernels import _gpu, _training, operation


@operation
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    shared: tuple[int, ...] = (),
) -> Tensor:
    """q [T, heads, head_dim], k and v [T, key_value_heads, head_dim] to q's shape.

    `lengths` are those of the sequences, in order, and sum to T. A window counts the token itself. `shared` is of each
    sequence, 0 for all when empty: the tokens of another one that come before its own, and are not among its `lengths`.
    The softmax is computed in float32 at least.
    """
    group = q.shape[1] // k.shape[1]
    outputs = []
    for queries, keys, values in _sequences(q, k, v, lengths, shared):
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
        scores = scale * (queries @ keys.transpose(1, 2))  # [heads, n, s + n]
        scores = scores.masked_fill(~visible(queries.shape[1], keys.shape[1], window, q.device), float("-inf"))
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        outputs.append((torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ values).transpose(0, 1))
    return torch.cat(outputs)


@attention.backend("sdpa", lambda q, *_, **__: q.device.type in ("cpu", "cuda"))
def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    shared: tuple[int, ...] = (),
) -> Tensor:
    """torch's scaled_dot_product_attention, a sequence at a time."""
    outputs = []
    for queries, keys, values in _sequences(q, k, v, lengths, shared):
        count, seen = queries.shape[1], keys.shape[1]
        limited = count < seen or (window is not None and count > window)
        output = functional.scaled_dot_product_attention(
            queries.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=visible(count, seen, window, q.device) if limited else None,
            is_causal=not limited,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(output.squeeze(0).transpose(0, 1))  # [n, heads, head_dim]
    return torch.cat(outputs)


def _takes_on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,  # noqa: ARG001
    window: int | None = None,
    shared: tuple[int, ...] = (),
) -> bool:
    """Several sequences, or a window: for a whole one there is torch's kernel."""
    ragged = len(lengths) > 1 or (window is not None and window < q.shape[0])
    return ragged and not any(shared) and on_gpu.takes(q, k, v) and q.device.type == _gpu.device_type


@attention.backend("cuda", _takes_on_gpu)
@attention.backend("cpu", lambda q, k, v, *_, **__: _training.takes(q, k, v))
def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    shared: tuple[int, ...] = (),
) -> Tensor:
    """A tile of queries and a block of keys at a time: no matrix of tokens by tokens, no mask."""
    y: Tensor = _Attention.apply(q, k, v, lengths, shared, scale, window or 0)
    return y


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _gpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    _shared: list[int],
    scale: float,
    window: int,
    y: Tensor,
    m: Tensor,
) -> None:
    on_gpu.forward(_gpu.launch, q, k, v, _ends(lengths, q.device), scale, window, y, m)


def _gpu_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    _shared: list[int],
    scale: float,
    window: int,
    *rest: Tensor,
) -> None:
    on_gpu.backward(_gpu.launch, q, k, v, _ends(lengths, q.device), scale, window, *rest)


_gpu.implement("attention_forward", _gpu_forward)
_gpu.implement("attention_backward", _gpu_backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        shared: tuple[int, ...],
        scale: float,
        window: int,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        y, m = (
            torch.empty_like(q),
            q.new_empty(q.shape[:2], dtype=torch.float32),
        )  # m: the logarithm of each row's sum of exponentials
        ctx.shape = list(lengths), list(shared), scale, window
        torch.ops.ftkit.attention_forward(q, k, v, *ctx.shape, y, m)
        ctx.save_for_backward(q, k, v, y, m)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, m = ctx.saved_tensors
        # the core adds up over blocks of keys in float32, the GPU's kernels in registers
        dtype = q.dtype if q.device.type == _gpu.device_type else torch.float32
        dq, dk, dv = (torch.empty_like(one, dtype=dtype) for one in (q, k, v))
        torch.ops.ftkit.attention_backward(q, k, v, *ctx.shape, y, m, dy.contiguous(), dq, dk, dv)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None, None, None


def visible(count: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """The mask [count, seen] of the last `count` of `seen` tokens: may that of the row see that of the column?"""
    before = seen - count
    mask = torch.ones(count, seen, dtype=torch.bool, device=device).tril(before)
    return mask if window is None else mask.triu(before + 1 - window)


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], shared: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of each sequence that has tokens: [heads, n, head_dim], and [heads, s + n, head_dim] with s shared."""
    parts = [[part.transpose(0, 1) for part in x.split(lengths)] for x in (q, k, v)]
    whole = parts[1][0], parts[2][0]
    for queries, keys, values, count in zip(*parts, shared or (0,) * len(lengths), strict=True):
        if count:
            keys, values = (torch.cat([a[:, :count], b], 1) for a, b in zip(whole, (keys, values), strict=True))
        else:
            whole = keys, values
        if queries.shape[1]:
            yield queries, keys, values
