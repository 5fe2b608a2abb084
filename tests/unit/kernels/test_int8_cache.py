"""Keys and values in 8 bits: the core keeps and reads what torch does, and what runs over them stays exact besides."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_models
from families import saved
from ftkit import adapters, models
from ftkit.engine import Engine, Sampling
from ftkit.errors import InputError
from ftkit.kernels._cache_codes import BLOCK, decode, encode, record_bytes
from ftkit.kernels.attention import attention
from ftkit.kernels.decoder_layers import decoder_layers
from ftkit.kernels.paged_attention import paged_attention
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.paged_cache import PagedCache

pytestmark = pytest.mark.unit


@given(st.integers(1, 70), st.integers(-18, 18), st.integers(0, 2**31))
def test_no_number_is_off_by_more_than_half_a_code(size: int, power: int, seed: int) -> None:
    x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    records = encode(x)
    assert records.shape == (3, 2, record_bytes(size))
    for ours, theirs in zip(decode(records, size).split(BLOCK, -1), x.split(BLOCK, -1), strict=True):
        assert ((ours - theirs).abs() <= theirs.abs().amax(-1, keepdim=True) * (0.5001 / 127)).all()


def test_what_is_no_number_stays_none_and_nothing_is_nothing() -> None:
    x = torch.ones(3, 34)
    x[0, 33], x[1, 33], x[2, :] = torch.nan, torch.inf, 0
    found = decode(encode(x), 34)
    assert found[:2, 33].isnan().all()
    assert torch.equal(found[:2, :32], x[:2, :32])
    assert torch.equal(found[2], x[2])


@pytest.mark.parametrize("window", [None, 4])
def test_the_core_reads_what_torch_keeps(window: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    heads, kv_heads, size, block = 6, 2, 37, 5
    lengths, totals = (1, 3, 2), (13, 3, 67)
    k, v = (torch.randn(sum(totals), kv_heads, size, generator=generator) for _ in range(2))
    q = torch.randn(sum(lengths), heads, size, generator=generator)
    pages = torch.full((20, 3, 2, block, kv_heads, record_bytes(size)), 0xFF, dtype=torch.uint8)
    order, table = torch.randperm(20, generator=generator).tolist(), torch.zeros(3, 14, dtype=torch.int32)
    for row, (start, total) in enumerate(zip(itertools.accumulate((0, *totals)), totals, strict=False)):
        for position in range(total):
            if position % block == 0:
                table[row, position // block] = order.pop()
            page = table[row, position // block]
            for side, values in enumerate((k, v)):
                pages[page, 1, side, position % block] = encode(values[start + position])
    positions = torch.tensor(
        [p for n, t in zip(lengths, totals, strict=True) for p in range(t - n, t)], dtype=torch.int32
    )
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    # attention over the numbers that the codes stand for
    seen_k, seen_v = (decode(encode(values), size) for values in (k, v))
    queries = torch.zeros(sum(totals), heads, size)
    places = [e - n + i for e, n in zip(itertools.accumulate(totals), lengths, strict=True) for i in range(n)]
    queries[places] = q
    expected = attention.reference(queries, seen_k, seen_v, totals, scale=0.3, window=window)[places]
    for operation in (paged_attention.reference, paged_attention):
        found = operation(
            q, pages, table, ends, positions, lengths, totals, layer=1, scale=0.3, window=window
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_core_keeps_what_torch_keeps(tmp_path: Path) -> None:
    model = tiny_models.ours(tiny_models.peer("qwen3", torch.float32), tmp_path, torch.float32).model
    config, found, kept = model.config, [], []
    for operation in (decoder_layers, decoder_layers.reference):
        sizes = {"layers": config.layers, "key_value_heads": config.key_value_heads, "head_dim": config.head_dim}
        cache = PagedCache(page_count=8, block_tokens=4, dtype=torch.int8, **sizes)
        cache.pool.zero_()
        batch = RaggedBatch.pack([[5, 8, 13, 21, 34, 55, 89], [3, 1, 4]])
        object.__setattr__(batch, "block_table", torch.tensor([[6, 1], [3, 0]], dtype=torch.int32))
        with torch.inference_mode():
            x = model.embed_tokens(batch.tokens, batch.routes)
            found.append(operation(x, model.rotary(batch.positions, x.dtype), batch, cache, model))
        kept.append(decode(cache.pages[[6, 1, 3]], config.head_dim))
        assert cache.pool.shape[1] == PagedCache.page_bytes(block_tokens=4, dtype=torch.int8, **sizes)
    # what both round may lie on the other side of a half: one code of some 254 apart
    scale = kept[1].abs().amax(-1, keepdim=True)
    assert ((kept[0] - kept[1]).abs() <= scale * 0.02).all()
    assert (kept[0] == kept[1]).float().mean() > 0.5
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)


def test_pages_take_a_third_and_answers_are_the_same_in_any_company(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama")
    loaded = models.load(tmp_path / "model")
    adapters.attach(loaded.model, "lora", {"rank": 4, "target_modules": ("q_proj", "v_proj")}, seed=0, adapter_id=90)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model, 90).values():
            parameter.add_(0.1)
    adapters.save(loaded.model, 90, tmp_path / "mine")
    adapters.detach(loaded.model, 90)
    prompts = ["What is it that we know?", "What is it that we see?", "abcabcabcabcabc"] * 2
    names = [None] * 3 + ["mine"] * 3
    how = [Sampling(temperature=0.7, seed=seed, max_tokens=16, logprobs=1, ignore_end=True) for seed in range(6)]

    def answers(together: bool, **options: object) -> tuple[list[object], dict[str, int]]:
        with Engine(loaded, pool_bytes=1 << 20, block_tokens=4, **options) as engine:  # type: ignore[arg-type]
            engine.add_adapter("mine", tmp_path / "mine")
            if together:
                found = engine.generate_many(prompts, how, model=names)
            else:
                found = [
                    engine.generate(p, h, model=n)
                    for p, h, n in zip(prompts, how, names, strict=True)
                    for _ in range(2)
                ][1::2]
            return [answer.logprobs for answer in found], engine.metrics

    alone, counted = answers(False, kv_cache="int8")
    # each the second time: its prompt was there
    assert counted["cached_tokens_total"] > 50
    assert answers(True, kv_cache="int8")[0] == alone
    assert answers(True, kv_cache="int8", draft_tokens=3)[0] == alone
    assert answers(True, kv_cache="int8", draft=models.load(tmp_path / "model"))[0] == alone
    full, before = answers(True)
    assert full != alone
    assert before["block_bytes"] * 20 / 64 == counted["block_bytes"]  # heads of 16: 64 bytes, or 16 and a scale
    with pytest.raises(InputError, match="kv_cache: expected full or int8, got 'int4'"):
        Engine(loaded, kv_cache="int4")
