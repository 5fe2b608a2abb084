"""Launches of what stands between a model's products: norms, activations, angles, the loss; and the optimizer's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ftkit.cuda.launch import TYPES, Launch, blocks_of
from ftkit.cuda.source import variant


def rms_norm(launch: Launch, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x [rows, d] to (y, 1 / √(mean(x²) + ε) float32 [rows])."""
    y, scales = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    if x.numel():
        kernel = variant("rms_norm", VALUE=TYPES[x.dtype])
        launch(kernel, "rms_norm_forward", (x.shape[0],), [x, weight, y, scales, x.shape[1], epsilon])
    return y, scales


def rms_norm_dx(launch: Launch, dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """The gradient in x."""
    dx = torch.empty_like(x)
    if x.numel():
        kernel = variant("rms_norm", VALUE=TYPES[x.dtype])
        launch(kernel, "rms_norm_dx", (x.shape[0],), [dy, x, weight, scales, dx, x.shape[1]])
    return dx


def rms_norm_dweight(launch: Launch, dy: Tensor, x: Tensor, scales: Tensor) -> Tensor:
    """The gradient in the weight, float32 [d]."""
    dweight = x.new_zeros(x.shape[1], dtype=torch.float32)
    if x.numel():
        kernel = variant("rms_norm", VALUE=TYPES[x.dtype])
        grid = (blocks_of(x.shape[1], kernel.constant("COLUMNS")),)
        launch(kernel, "rms_norm_dweight", grid, [dy, x, scales, dweight, *x.shape])
    return dweight


def swiglu(launch: Launch, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    y = torch.empty_like(gate)
    if count := y.numel():
        kernel = variant("swiglu", VALUE=TYPES[gate.dtype])
        launch(kernel, "swiglu_forward", (blocks_of(count, 8 * kernel.constant("THREADS")),), [gate, up, y, count])
    return y


def swiglu_backward(launch: Launch, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients in gate and up."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if count := dy.numel():
        kernel = variant("swiglu", VALUE=TYPES[gate.dtype])
        grid = (blocks_of(count, 8 * kernel.constant("THREADS")),)
        launch(kernel, "swiglu_backward", grid, [dy, gate, up, dgate, dup, count])
    return dgate, dup


def rope(launch: Launch, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x [tokens, heads, head_dim] turned by the angles [tokens, head_dim / 2], or turned back."""
    y = torch.empty_like(x)
    if x.numel():
        tokens, heads, size = x.shape
        kernel = variant("rope", VALUE=TYPES[x.dtype])
        grid = (blocks_of(x.numel() // 16, kernel.constant("THREADS")),)
        launch(kernel, "rope", grid, [x, cos, sin, y, tokens, heads, size // 2, -1.0 if back else 1.0])
    return y


def cross_entropy(launch: Launch, logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """logits [rows, V] and targets i64 [rows] to losses float32 [rows], and the gradient where one is asked for."""
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    slope = torch.empty_like(logits) if gradient else logits.new_empty(0)
    if logits.numel():
        kernel = variant("cross_entropy", VALUE=TYPES[logits.dtype], GRADIENT=int(gradient))
        launch(kernel, "cross_entropy", (len(targets),), [logits, targets, losses, slope, logits.shape[1]])
    return losses, slope if gradient else None


def adamw_8bit(
    launch: Launch,
    weight: Tensor,
    gradient: Tensor,
    mean: Sequence[Tensor],
    square: Sequence[Tensor],
    factors: Sequence[float],
) -> None:
    """Moves in place; a state is (codes, greatest, map, edges), the factors β₁, β₂, ε, rate, correction, kept."""
    beta1, beta2, *rest = factors
    if count := weight.numel():
        kernel = variant("adamw_8bit")
        grid = (blocks_of(count, kernel.constant("THREADS")),)
        betas = [beta1, 1 - beta1, beta2, 1 - beta2]
        launch(kernel, "adamw_8bit", grid, [weight, gradient, *mean, *square, count, *betas, *rest])
