"""A model with a cache computes what it computes without: for every family, in chunks of any size."""

from pathlib import Path

import pytest
import torch

from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.paged_cache import PagedCache
from tiny_models import ours, peer

pytestmark = pytest.mark.unit


def cached(loaded: LoadedModel, sequences: list[list[int]], chunks: list[list[int]]) -> list[torch.Tensor]:
    """The hidden states of sequences that are fed in chunks, interleaved, over pages in disorder."""
    config, block = loaded.config, 4
    cache = PagedCache(
        layers=config.layers,
        key_value_heads=config.key_value_heads,
        head_dim=config.head_dim,
        page_count=40,
        block_tokens=block,
        dtype=loaded.model.dtype,
    )
    cache.pool.fill_(0xFF)  # not a number, in every dtype
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(-(-len(sequence) // block))] for sequence in sequences]
    done = [0] * len(sequences)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    step = 0
    while any(count < len(sequence) for count, sequence in zip(done, sequences, strict=True)):
        active = [i for i, sequence in enumerate(sequences) if done[i] < len(sequence)]
        parts = [sequences[i][done[i] : done[i] + chunks[i][step % len(chunks[i])]] for i in active]
        batch = RaggedBatch.pack(parts, starts=[done[i] for i in active])
        width = max(len(tables[i]) for i in active)
        table = torch.tensor([tables[i] + [0] * (width - len(tables[i])) for i in active], dtype=torch.int32)
        batch = RaggedBatch(**{**vars(batch), "block_table": table})
        hidden = loaded.model(batch, cache).split([len(part) for part in parts])
        for i, part, states in zip(active, parts, hidden, strict=True):
            found[i].append(states)
            done[i] += len(part)
        step += 1
    return [torch.cat(states) for states in found]


@pytest.mark.parametrize("variant", ["llama", "llama tied", "mistral", "qwen2", "qwen3 windows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_a_cache_and_without(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = ours(peer(variant), tmp_path, dtype)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(97, (n,), generator=generator).tolist() for n in (1, 13, 22, 7)]
    with torch.inference_mode():
        states = cached(loaded, sequences, [[1], [5, 1, 1], [9, 3, 1], [1]])
        for sequence, found in zip(sequences, states, strict=True):
            expected = loaded.model(RaggedBatch.pack([sequence]))
            tolerance = 1e-9 if dtype == torch.float64 else 2e-4
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
