"""The hidden states of a text in chunks over pages, to the bit those of the text at once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from families import saved
from ftkit import adapters, models
from ftkit.engine._step import ModelStep
from ftkit.models import LoadedModel
from ftkit.nn.batch import NO_ADAPTER, RaggedBatch
from ftkit.nn.paged_cache import PagedCache
from step_calls import hidden

pytestmark = pytest.mark.unit

ADAPTER = 7
TEXT = [(5 * number * number + number) % 90 + 3 for number in range(83)]
PAGES = [4, 1, 9, 0, 7, 2, 11, 5, 3, 8, 6]
BLOCK_TOKENS = 8


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    saved(folder, "llama")
    loaded = models.load(folder)
    adapters.attach(loaded.model, "lora", {"rank": 3}, seed=0, adapter_id=ADAPTER)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model, ADAPTER).values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return loaded


def chunked(loaded: LoadedModel, adapter: int, lengths: Sequence[int]) -> Tensor:
    """The hidden states [tokens, d] of the text in chunks of these lengths, by the step that the engine calls."""
    config = loaded.config
    heads = {"layers": config.layers, "key_value_heads": config.key_value_heads, "head_dim": config.head_dim}
    cache = PagedCache(page_count=len(PAGES) + 1, block_tokens=BLOCK_TOKENS, **heads)
    step = ModelStep(loaded.model, cache, tokens=len(TEXT), sequences=1, blocks=len(PAGES))
    found, start = [], 0
    for length in lengths:
        found.append(hidden(step, TEXT[start : start + length], start, PAGES, adapter))
        start += length
    assert start == len(TEXT)
    return torch.cat(found)


@pytest.mark.parametrize("adapter", [NO_ADAPTER, ADAPTER])
def test_chunks_do_not_show(loaded: LoadedModel, adapter: int) -> None:
    whole = chunked(loaded, adapter, [83])
    for lengths in ([41, 42], [7, 13, 1, 30, 32], [1] * 83):
        assert torch.equal(chunked(loaded, adapter, lengths), whole)
    with torch.inference_mode():
        expected: Tensor = loaded.model(RaggedBatch.pack([TEXT], adapter=adapter))
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    other = chunked(loaded, ADAPTER if adapter == NO_ADAPTER else NO_ADAPTER, [83])
    assert (whole - other).abs().max() > 0.01
