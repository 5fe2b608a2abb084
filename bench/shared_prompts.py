"""Pairs with long prompts: a DPO step on SmolLM2-135M with each prompt once in its row, against both answers apart.

The same pairs and the same update; pairs a second. Of a pair with a prompt of x tokens and answers of y, 2x + 2y tokens
become x + 2y: (x + y) / (x / 2 + y) times as many pairs a second, and more where attention's square counts.
"""

import time
from typing import Any

import torch

from bench._figures import line, smollm2
from ftkit import adapters, models
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import dpo

PROMPTS = (64, 400)
ANSWER = 64
PAIRS = 2
ROUNDS = 4


def run() -> list[dict[str, Any]]:
    """Pairs a second, forward and backward."""
    model = models.load(models.resolve(str(smollm2()))).model
    adapters.attach(model, "lora", {}, 0, 0)
    model.train()
    found = []
    for prompt in PROMPTS:
        once, apart = _batch(prompt, True), _batch(prompt, False)
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(ROUNDS + 1):
            for speeds, batch in zip(times, (once, apart), strict=True):
                start = time.perf_counter()
                dpo.loss(model, batch, dpo.Config()).sum.sum().backward()
                if number:
                    speeds.append(PAIRS / (time.perf_counter() - start))
        by_tokens = (prompt + ANSWER) / (prompt / 2 + ANSWER)
        name = f"pairs of {prompt} + {ANSWER} tokens, prompts once (× {by_tokens:.2f} by tokens)"
        found.append(line(name, "pairs/s of prompts twice", *times))
    return found


def _batch(prompt: int, share: bool) -> RaggedBatch:
    """Pairs of random tokens; trained on are the answers."""
    generator = torch.Generator().manual_seed(prompt)
    rows, targets, shared = [], [], []
    for _ in range(PAIRS):
        x = torch.randint(1000, 40000, (prompt,), generator=generator).tolist()
        for alike in (0, prompt - 1 if share else 0):
            answer = torch.randint(1000, 40000, (ANSWER,), generator=generator).tolist()
            rows.append([*x, *answer][alike:])
            targets.append(([-100] * (prompt - 1) + answer + [-100])[alike:])
            shared.append(alike)
    return RaggedBatch.pack(rows, targets=targets, adapter=0, shared=shared if share else ())
