"""Keys and values in 8 bits against float32: what it costs in perplexity, what it saves in memory, how fast it is.

perplexity      of `held_out.txt`, every position attending to pages, as served prompts do
a token         bytes of its keys and values
8 answers       tokens a second after prompts of about 900 tokens
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._figures import line, smollm2
from ftkit import data, models
from ftkit.config import DataConfig
from ftkit.engine import Engine, Sampling
from ftkit.eval import perplexity
from ftkit.models import LoadedModel
from ftkit.nn.paged_cache import PagedCache

TEXT = Path(__file__).parent / "held_out.txt"
ROUNDS, ANSWERS, TOKENS = 3, 8, 24


def run() -> list[dict[str, Any]]:
    """One line for each comparison."""
    loaded = models.load(smollm2(), quant="gguf")
    full = list(_scored(loaded, torch.float32))
    found = perplexity.summary(iter(full), None)
    coded = perplexity.summary(_scored(loaded, torch.int8), iter(full))
    name = f"perplexity, keys and values in int8 (KL {coded['kl_mean']:.5f}, top-1 {coded['top1']:.3f})"
    sizes = [[float(_bytes(loaded, dtype))] for dtype in (torch.int8, torch.float32)]
    return [
        line(name, "in float32", [coded["perplexity"]], [found["perplexity"]], less=True),
        line("keys and values of a token", "bytes in float32", *sizes, less=True),
        _speed(loaded),
    ]


def _cache(loaded: LoadedModel, dtype: torch.dtype, pages: int) -> PagedCache:
    config = loaded.config
    sizes = {"layers": config.layers, "key_value_heads": config.key_value_heads, "head_dim": config.head_dim}
    return PagedCache(page_count=pages, dtype=dtype, **sizes)


def _bytes(loaded: LoadedModel, dtype: torch.dtype) -> int:
    cache = _cache(loaded, dtype, 1)
    return cache.pool.nbytes // cache.block_tokens


def _scored(loaded: LoadedModel, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """(log-probabilities [positions, vocabulary], targets [positions]) of the text, over pages of a dtype."""
    dataset, _ = data.prepare(DataConfig(path=str(TEXT), long_rows="split"), loaded.tokenizer, loaded.template, seed=0)
    for batch in dataset.batches(1, passes=1):
        assert batch.targets is not None
        blocks = [-(-length // 16) for length in batch.lengths]
        table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for row, count in enumerate(blocks):
            table[row, :count] = torch.arange(count) + sum(blocks[:row])
        object.__setattr__(batch, "block_table", table)
        with torch.inference_mode():
            hidden = loaded.model(batch, _cache(loaded, dtype, sum(blocks)))
            for rows in batch.trained.split(256):
                logits = loaded.model.head(hidden[rows], batch.routes.take(rows.tolist()))
                yield logits.double().log_softmax(-1), batch.targets[rows].long()


def _speed(loaded: LoadedModel) -> dict[str, Any]:
    how = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_end=True)
    text = TEXT.read_text(encoding="utf-8")

    def rate(engine: Engine) -> float:
        prompts = [engine.encode(f"{number}. {text}")[:900] for number in range(ANSWERS)]
        for prompt in prompts:  # what is timed finds its prompt in the pool
            engine.generate(prompt, Sampling(temperature=0.0, max_tokens=1))
        start = time.perf_counter()
        engine.generate_many(prompts, how)
        return ANSWERS * TOKENS / (time.perf_counter() - start)

    with Engine(loaded, pool_bytes=1 << 30, kv_cache="int8") as ours, Engine(loaded, pool_bytes=1 << 30) as peer:
        rate(ours), rate(peer)
        pairs = [(rate(ours), rate(peer)) for _ in range(ROUNDS)]
    unit = f"tokens/s in float32 ({torch.get_num_threads()} threads)"
    return line(f"{ANSWERS} answers after 900 tokens", unit, [a for a, _ in pairs], [b for _, b in pairs])
