"""A LoRA training step of SmolLM2-135M: real tokens a second and peak memory, against transformers with peft.

Both sides train rank 16 on all linear layers with AdamW, on the same tokens and in the same precision, and take turns,
each in a process of its own: in float32, and in bfloat16 where the processor has tiles for it. Conversations have the
lengths of chats and are one ragged batch here; there they are padded to the longest, or packed: one row, positions
starting anew with each (transformers then masks the others).

Then our step with frozen matrices' products in 8 bits against that peer, and our step beside a process that keeps one
core busy against the same step alone. Where there are as many threads as cores it may take twice as long, no more.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch

from bench._figures import line, smollm2
from bench._side import Side
from ftkit import _core

ROUNDS = 3
RANK = 16
SHAPES = ("chat lengths, peer pads", "chat lengths, peer packs", "rows of 256", "rows of 512", "rows of 512, int8")
Batch = list[list[int]]


def run() -> list[dict[str, Any]]:
    """Tokens a second, and the processes' peak memory, of each shape."""
    found: list[dict[str, Any]] = []
    halves = [f"{shape}, bfloat16" for shape in SHAPES if "int8" not in shape]
    for shape in (*SHAPES, *(halves if _core.multiplies_bfloat16() else [])):
        roof = _roof(_dtype(shape)) / _flops_a_token()
        sides = {"ours": Side(_ours, shape), "peer": Side(_peer, shape, peer=True)}
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        for number in range(ROUNDS + 1):
            losses = []
            for name, side in sides.items():
                seconds, (tokens, loss) = side.step(number)
                losses.append(loss)
                if number:  # the first warms up
                    rates[name].append(tokens / seconds)
            near = 1e-4 if _dtype(shape) == torch.float32 and "int8" not in shape else 1e-2
            assert number or math.isclose(*losses, rel_tol=near), f"expected the same loss of both, got {losses}"
        peak = {name: [side.close()] for name, side in sides.items()}
        found.append(line(f"train step, {shape}", "real tokens/s", rates["ours"], rates["peer"], roof=roof))
        found.append(line(f"train step, {shape}, peak memory", "MiB", peak["ours"], peak["peer"], less=True))
    return [*found, _beside_a_neighbour()]


def _beside_a_neighbour() -> dict[str, Any]:
    """Steps beside a busy process, against steps alone."""
    side = Side(_ours, SHAPES[0])
    rates: dict[str, list[float]] = {"alone": [], "beside": []}
    side.step(0)
    for number in range(1, ROUNDS + 1):
        for name, found in rates.items():
            neighbour = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
            if name == "beside":
                neighbour.start()
                time.sleep(1.0)  # until it spins
            seconds, (tokens, _) = side.step(number)
            found.append(tokens / seconds)
            if name == "beside":
                neighbour.kill()
                neighbour.join()
    side.close()
    return line("train step beside a busy process", "tokens/s of alone", rates["beside"], rates["alone"])


def _spin() -> None:
    while True:
        pass


def profile() -> str:
    """Where the time of a step of ours goes, by operation."""
    step = _ours(SHAPES[0])
    step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step(0)
    table: str = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=48)
    return table


def _rows(number: int, shape: str) -> Batch:
    """Conversations of a step; the lengths of chats are lognormal (median 180, at most 1,024)."""
    generator = torch.Generator().manual_seed(number)
    lengths = [512 if "512" in shape else 256] * 4
    if shape.startswith("chat"):
        draws = torch.exp(math.log(180) + 0.7 * torch.randn(4, generator=generator)).int().clamp(16, 1024)
        lengths = draws.tolist()
    return [torch.randint(17, 49152, (length,), generator=generator).tolist() for length in lengths]


def _dtype(shape: str) -> torch.dtype:
    return torch.bfloat16 if shape.endswith("bfloat16") else torch.float32


def _ours(shape: str) -> Callable[[int], tuple[int, float]]:
    from ftkit import adapters, models, optim
    from ftkit.config import Choice
    from ftkit.nn.batch import RaggedBatch
    from ftkit.nn.eight_bits import in_eight_bits
    from ftkit.objectives import sft

    model = models.load(smollm2(), dtype=_dtype(shape)).model.train()
    adapters.attach(model, "lora", {"rank": RANK}, seed=0)
    if shape.endswith("int8"):
        in_eight_bits(linear for linear in model.linears().values() if linear is not model.lm_head)
        model.train()
    optimizer = optim.build(Choice(name="adamw"), adapters.trainable(model))

    def step(number: int) -> tuple[int, float]:
        rows = _rows(number, shape)
        batch = RaggedBatch.pack(rows, targets=[[*row[1:], -100] for row in rows], adapter=0)
        parts = sft.loss(model, batch)
        loss = (parts.sum / parts.count).sum()
        loss.backward()
        optimizer.step(1.0)
        model.zero_grad()
        return sum(map(len, rows)), float(loss.detach())

    return step


def _peer(shape: str) -> Callable[[int], tuple[int, float]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = smollm2()
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=_dtype(shape))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def padded(rows: Batch) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def packed(rows: Batch) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[token for row in rows for token in row]])
        positions = torch.tensor([[position for row in rows for position in range(len(row))]])
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}

    def step(number: int) -> tuple[int, float]:
        rows = _rows(number, shape)
        loss = model(**(packed(rows) if "packs" in shape else padded(rows)), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return sum(map(len, rows)), float(loss.detach())

    return step


def _flops_a_token() -> float:
    """Multiplications and additions that a step needs: forward and the gradient in x of all matrices."""
    layers, d, inner, kv, vocabulary = 30, 576, 1536, 192, 49152
    matrices = layers * (2 * d * d + 2 * d * kv + 3 * d * inner) + d * vocabulary
    return 4.0 * matrices


def _roof(dtype: torch.dtype) -> float:
    """This machine's matmul in the step's most frequent shape, in operations a second: the best of 20."""
    x, w = torch.randn(1024, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        x @ w.T
        best = min(best, time.perf_counter() - start)
    return 2 * x.numel() * w.shape[0] / best
