"""What parity compares: continuations are those of a model that reads the whole prompt anew for each token."""

from pathlib import Path

import pytest
import torch

from ftkit import adapters
from ftkit.eval import parity
from ftkit.nn.batch import RaggedBatch
from tiny_models import ours, peer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["llama", "qwen3 windows"])
def test_continuations_are_those_without_a_cache(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = ours(peer(variant), tmp_path, dtype)
    adapters.attach(loaded.model, "lora", {"rank": 3}, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    prompts = [[5], [11, 2, 33, 7, 90, 13, 4], [42, 8, 1]]
    found = {}
    for adapter in (-1, 0):
        rows = [list(prompt) for prompt in prompts]
        for _ in range(16):
            batch = RaggedBatch.pack(rows, adapter=adapter)
            with torch.inference_mode():
                logits = loaded.model.head(loaded.model(batch), batch.routes)[batch.last]
            for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                row.append(token)
        found[adapter] = parity._greedy(loaded, prompts, adapter)
        assert found[adapter] == rows
    assert found[-1] != found[0]
    assert prompts == [[5], [11, 2, 33, 7, 90, 13, 4], [42, 8, 1]]
