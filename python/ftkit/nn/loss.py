"""The loss of each row of hidden states, without the logits of all rows in memory at once.

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
Measure = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits [K, V], the K rows that they are of, whether a gradient is asked for) → (losses [K], the gradient [K, V] or
None); the losses are differentiable where none is asked for."""
Chunks = list[tuple[slice, Routes | None]]

CHUNK_BYTES = 2**25
"""A chunk's logits: few beside a model's activations, and enough rows for a fast matmul."""


def token_losses(head: Head, hidden: Tensor, targets: Tensor, vocab_size: int, **options: Any) -> Tensor:
    """hidden [rows, d] and targets i64 [rows] to −log p(target) [rows]; `options` as `row_losses` has them."""

    def measure(logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, Tensor | None]:
        return cross_entropy(logits, targets[rows], gradient=gradient)

    return row_losses(head, hidden, measure, vocab_size, **options)


def row_losses(
    head: Head,
    hidden: Tensor,
    measure: Measure,
    vocab_size: int,
    *,
    routes: Routes | None = None,
    head_is_trained: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """hidden [rows, d] to what `measure` makes of their logits [rows], in float32 at least; differentiable.

    `routes` are those of the rows, where an adapter changes the head. `head_is_trained`: gradients are to reach it.
    """
    size = max(16, chunk_bytes // (vocab_size * hidden.itemsize))
    chunks: Chunks = []
    for begin in range(0, hidden.shape[0], size):
        end = min(begin + size, hidden.shape[0])
        chunks.append((slice(begin, end), None if routes is None else routes.take(range(begin, end))))
    if not chunks:
        return hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32)) + 0 * hidden.sum()
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head_is_trained):
        return torch.cat([measure(head(hidden[rows], part), rows, False)[0] for rows, part in chunks])
    if head_is_trained:

        def losses(x: Tensor, rows: slice, part: Routes | None) -> Tensor:
            return measure(head(x, part), rows, False)[0]

        return torch.cat([checkpoint(losses, hidden[rows], rows, part, use_reentrant=False) for rows, part in chunks])
    found: Tensor = _FrozenHead.apply(hidden, measure, head, chunks)
    return found


class _FrozenHead(torch.autograd.Function):
    """Losses whose gradient in the hidden states is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, measure: Measure, head: Head, chunks: Chunks) -> Tensor:
        slopes = torch.empty_like(hidden)
        losses = []
        for rows, routes in chunks:
            x = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(x, routes)
            found, slope = measure(logits.detach(), rows, True)
            slopes[rows] = torch.autograd.grad(logits, x, slope)[0]
            losses.append(found)
        ctx.save_for_backward(slopes)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0].unsqueeze(1).to(slopes.dtype), None, None, None
