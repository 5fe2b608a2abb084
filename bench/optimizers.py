"""An optimizer's step over matrices of SmolLM2-135M's sizes: seconds a step, against torch and bitsandbytes on the CPU.

A sixth of the model's weights, whose time a step grows with: AdamW against torch's fused AdamW, and AdamW in 8 bits
against bitsandbytes' AdamW8bit.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from bench._figures import line
from ftkit.config import Choice
from ftkit.optim import build

SHAPES = [(1536, 576), (576, 1536), (576, 576), (192, 576)] * 10
ROUNDS = 5


def run() -> list[dict[str, Any]]:
    """Seconds a step, once the state is there."""
    import bitsandbytes.optim.adamw

    peer: Any = bitsandbytes.optim.adamw.AdamW8bit
    whole = _compare("adamw", lambda weights: torch.optim.AdamW(weights, fused=True))
    eighth = _compare("adamw8bit", peer)
    return [
        line("optimizer adamw", "s/step of torch's fused AdamW", *whole, less=True),
        line("optimizer adamw8bit", "s/step of bitsandbytes' AdamW8bit", *eighth, less=True),
    ]


def _compare(name: str, peer: Callable[[list[torch.nn.Parameter]], Any]) -> tuple[list[float], list[float]]:
    ours, theirs = _weights(), _weights()
    optimizer = build(Choice(name=name), {f"layers.{index}.weight": weight for index, weight in enumerate(ours)})
    oracle = peer(theirs)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for found, step in zip(times, (lambda: optimizer.step(1.0), oracle.step), strict=True):
            start = time.perf_counter()
            step()
            if number:
                found.append(time.perf_counter() - start)
    return times


def _weights() -> list[torch.nn.Parameter]:
    """Weights with gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in SHAPES]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator) * 0.01
    return weights
