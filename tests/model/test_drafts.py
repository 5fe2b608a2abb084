"""Tokens that are guessed and checked: the same answers to the bit, in fewer steps, under any adapter."""

from pathlib import Path

import pytest
import torch

from ftkit import adapters, models
from ftkit.engine import Completion, Engine, Sampling

pytestmark = pytest.mark.model

QUOTING = "Repeat: red, green, blue, red, green, blue, red, green, blue, red, green,"
HOW = [
    Sampling(temperature=0.0, max_tokens=24, logprobs=2, ignore_end=True),
    Sampling(temperature=0.8, seed=5, max_tokens=24, logprobs=2, ignore_end=True),
]


def test_drafts_change_no_bit_and_save_steps(smollm2: Path, tmp_path: Path) -> None:
    loaded = models.load(smollm2, quant="gguf")
    adapters.attach(loaded.model, "lora", {"rank": 4, "target_modules": ("q_proj",)}, seed=0, adapter_id=90)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model, 90).values():
            parameter.add_(0.01)
    adapters.save(loaded.model, 90, tmp_path / "mine")
    adapters.detach(loaded.model, 90)
    answers: list[list[Completion]] = []
    for draft_tokens in (0, 6):
        with Engine(loaded, pool_bytes=64 << 20, draft_tokens=draft_tokens) as engine:
            engine.add_adapter("mine", tmp_path / "mine")
            names = [None, "mine", None, "mine"]
            answers.append(engine.generate_many([QUOTING] * 4, [HOW[0], HOW[0], HOW[1], HOW[1]], model=names))
            counted = engine.metrics
    assert [answer.logprobs for answer in answers[0]] == [answer.logprobs for answer in answers[1]]
    assert [answer.text for answer in answers[0]] == [answer.text for answer in answers[1]]
    assert 10 < counted["accepted_tokens_total"] <= counted["drafted_tokens_total"]
