"""The loss of each trained token, without the logits of all tokens in memory at once.

The head is applied to a chunk of rows at a time. Where it is frozen, the gradient in the hidden states is computed in
the same pass, while the chunk's logits are there, and only [rows, d] is kept; where it is trained, a chunk's logits
are computed again in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ftkit.kernels.cross_entropy import cross_entropy
from ftkit.nn.routes import Routes

Head = Callable[[Tensor, Routes | None], Tensor]
Chunks = list[tuple[int, int, Routes | None]]

CHUNK_VALUES = 2**23
"""Logits of a chunk: 32 MiB in float32, near a processor's caches and enough rows for a fast matmul."""


def token_losses(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    vocab_size: int,
    *,
    routes: Routes | None = None,
    head_is_trained: bool = False,
    chunk_values: int = CHUNK_VALUES,
) -> Tensor:
    """hidden [rows, d] and targets i64 [rows] to the losses [rows], in float32 at least; differentiable.

    `routes` are those of the rows, where an adapter changes the head. `head_is_trained`: gradients are to reach it.
    """
    rows = max(16, chunk_values // vocab_size)
    chunks: Chunks = []
    for begin in range(0, hidden.shape[0], rows):
        end = min(begin + rows, hidden.shape[0])
        part = None if routes is None else routes.take(range(begin, end))
        chunks.append((begin, end, part))
    if not chunks:
        return hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32)) + 0 * hidden.sum()
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head_is_trained):
        return torch.cat([cross_entropy(head(hidden[b:e], part), targets[b:e])[0] for b, e, part in chunks])
    if head_is_trained:

        def losses(x: Tensor, wanted: Tensor, part: Routes | None) -> Tensor:
            return cross_entropy(head(x, part), wanted)[0]

        parts = [checkpoint(losses, hidden[b:e], targets[b:e], part, use_reentrant=False) for b, e, part in chunks]
        return torch.cat(parts)
    found: Tensor = _FrozenHead.apply(hidden, targets, head, chunks)
    return found


class _FrozenHead(torch.autograd.Function):
    """Losses whose gradient in the hidden states is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunks: Chunks) -> Tensor:
        slopes = torch.empty_like(hidden)
        losses = []
        for begin, end, routes in chunks:
            x = hidden[begin:end].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(x, routes)
            found, slope = cross_entropy(logits.detach(), targets[begin:end], gradient=True)
            slopes[begin:end] = torch.autograd.grad(logits, x, slope)[0]
            losses.append(found)
        ctx.save_for_backward(slopes)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0].unsqueeze(1).to(slopes.dtype), None, None, None
