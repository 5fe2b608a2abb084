"""How fast this machine multiplies matrices, measured in a blink."""

import functools
import time

import torch

_SIZE = (1024, 768, 1024)
"""Rows, inner and outer width of the measured product: like a small model's linear over a batch's tokens."""


@functools.cache
def matmul_flops_per_second(dtype: torch.dtype = torch.float32, seconds: float = 0.25) -> float:
    """Floating-point operations a second of torch's matmul on the CPU with the threads that torch now has.

    The median over repetitions that take about `seconds` together.
    """
    rows, inner, outer = _SIZE
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, outer).to(dtype)
    a @ b  # the first call sets the library up
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * outer / sorted(times)[len(times) // 2]
