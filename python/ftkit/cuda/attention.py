"""Launches of causal attention inside the sequences of a ragged batch, and its gradients; see kernels/attention.py."""

import torch
from torch import Tensor

from ftkit.cuda.launch import Argument, Launch, aligned, expect_shapes
from ftkit.cuda.source import variant
from ftkit.errors import InputError

HEADS = (64, 128)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Heads of 64 or 128 values in bfloat16."""
    known = q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.ndim == 3 and q.shape[-1] in HEADS
    return known and aligned(q, k, v)


def forward(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    scale: float,
    window: int | None,
    y: Tensor,
    m: Tensor,
) -> None:
    """y like q [T, heads, head_dim] of k and v [T, key_value_heads, head_dim], and m float32 [T, heads], the
    logarithm of each row's sum of exponentials; ends i32 [sequences + 1]: where each sequence begins, from 0, and T.

    Raises InputError for sizes that don't agree.
    """
    _expect("attention_forward", q, k, v, m, y=y)
    if q.numel():
        arguments: list[Argument] = [q, k, v, ends, y, m, *_numbers(q, k, ends), scale, window or 0]
        _launch(launch, "attention_forward", q, ends, q.shape[1], arguments)


def backward(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    scale: float,
    window: int | None,
    y: Tensor,
    m: Tensor,
    dy: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """dq, dk and dv of what `forward` made of these. Raises InputError for sizes that don't agree."""
    _expect("attention_backward", q, k, v, m, y=y, dy=dy, dq=dq)
    expect_shapes("attention_backward", dk=(dk, tuple(k.shape)), dv=(dv, tuple(k.shape)))
    if q.numel():
        along, numbers = torch.empty_like(m), [*_numbers(q, k, ends), scale, window or 0]
        _launch(launch, "attention_dq", q, ends, q.shape[1], [q, k, v, y, m, dy, ends, along, dq, *numbers])
        _launch(launch, "attention_dkv", q, ends, k.shape[1], [q, k, v, m, dy, along, ends, dk, dv, *numbers])


def _launch(launch: Launch, name: str, q: Tensor, ends: Tensor, heads: int, arguments: list[Argument]) -> None:
    kernel = variant("attention", HEAD=q.shape[2])
    launch(kernel, name, (q.shape[0] // kernel.constant("ROWS") + len(ends) - 1, heads), arguments)


def _numbers(q: Tensor, k: Tensor, ends: Tensor) -> list[int]:
    return [len(ends) - 1, q.shape[1], k.shape[1]]


def _expect(operation: str, q: Tensor, k: Tensor, v: Tensor, m: Tensor, **like_q: Tensor) -> None:
    keys = (q.shape[0], k.shape[1], q.shape[2])
    expect_shapes(operation, k=(k, keys), v=(v, keys), m=(m, tuple(q.shape[:2])))
    expect_shapes(operation, **{name: (tensor, tuple(q.shape)) for name, tensor in like_q.items()})
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise InputError(f"{operation}: expected heads that are a multiple of {k.shape[1]}, got {q.shape[1]}")
