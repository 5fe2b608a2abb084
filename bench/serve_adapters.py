"""Many adapters over one base: mixed batches against peft's, the cost of adapters, a thousand of them, a shared prefix.

    mixed batch of 8, 32            tokens a second against peft's `generate(adapter_names=...)`, as many rank-16 LoRAs
    8 adapters, none                tokens a second with, against without
    1,000 on disk, Zipf             tokens a second with a pool for about 50, against 5 that stay in it; and the time to
                                    the first token of the 5 that are asked for most, 99 of 100 requests within it
    shared prefix of 1,000 tokens   time to the first token of the first request, against the second's

peft holds float32 weights; ours stay in their blocks of 4 bits, as `ftkit serve` leaves them.
"""

import itertools
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._figures import line, smollm2
from ftkit import adapters, models
from ftkit.engine import Engine, Sampling
from ftkit.models import LoadedModel

PROMPT = "The history of the city begins with"
TOKENS = 32
ROUNDS = 3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MANY, REQUESTS, HELD = 1000, 200, 50


def run() -> list[dict[str, Any]]:
    """One line for each comparison."""
    loaded = models.load(smollm2(), quant="gguf")
    with tempfile.TemporaryDirectory() as folder:
        kept = [_lora(loaded, Path(folder) / str(number), 16, number) for number in range(8)]
        found = [_against_peft(loaded, kept, 8), _against_peft(loaded, kept, 32), _cost(loaded, kept)]
        small = [_lora(loaded, Path(folder) / f"small {number}", 4, number) for number in range(MANY)]
        return [*found, *_thousand(loaded, small), _prefix(loaded)]


def _lora(loaded: LoadedModel, folder: Path, rank: int, seed: int) -> Path:
    """A random LoRA on attention's layers."""
    adapters.attach(loaded.model, "lora", {"rank": rank, "target_modules": TARGETS}, seed=seed, adapter_id=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model, 0).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapters.save(loaded.model, 0, folder)
    adapters.detach(loaded.model, 0)
    return folder


def _engine(loaded: LoadedModel, folders: Sequence[Path], pool_bytes: int = 1 << 30) -> Engine:
    engine = Engine(loaded, pool_bytes=pool_bytes, context_tokens=2048, max_sequences=32)
    for folder in folders:
        engine.add_adapter(folder.name, folder, unread=True)
    return engine


def _rate(engine: Engine, names: Sequence[str | None], tokens: int = TOKENS) -> float:
    """Tokens a second of requests that come together, one for each name."""
    prompts = [f"{number}. {PROMPT}" for number in range(len(names))]
    start = time.perf_counter()
    engine.generate_many(prompts, Sampling(temperature=0.0, max_tokens=tokens, ignore_end=True), model=names)
    return len(names) * tokens / (time.perf_counter() - start)


def _against_peft(loaded: LoadedModel, folders: Sequence[Path], batch: int) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2()
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    peer = PeftModel.from_pretrained(base, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        peer.load_adapter(folder, adapter_name=folder.name)
    names = list(itertools.islice(itertools.cycle(folder.name for folder in folders), batch))
    given = tokenizer([PROMPT] * batch, return_tensors="pt")

    def theirs() -> float:
        start = time.perf_counter()
        peer.generate(**given, adapter_names=names, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        return batch * TOKENS / (time.perf_counter() - start)

    with _engine(loaded, folders) as engine:
        _rate(engine, names)
        pairs = [(_rate(engine, names), theirs()) for _ in range(ROUNDS)]
    unit = f"tokens/s of peft ({torch.get_num_threads()} threads)"
    return line(f"mixed adapters, batch {batch}", unit, [ours for ours, _ in pairs], [peer for _, peer in pairs])


def _cost(loaded: LoadedModel, folders: Sequence[Path]) -> dict[str, Any]:
    names = [folder.name for folder in folders]
    with _engine(loaded, folders) as engine:
        _rate(engine, names)
        pairs = [(_rate(engine, names), _rate(engine, [None] * len(names))) for _ in range(ROUNDS)]
    unit = "tokens/s without adapters"
    return line("8 adapters of rank 16", unit, [ours for ours, _ in pairs], [none for _, none in pairs])


def _first_tokens(engine: Engine, names: Sequence[str], hot: set[str]) -> float:
    """Seconds to the first token within which 99 of 100 requests for `hot` adapters have it; eight callers."""
    how = Sampling(temperature=0.0, max_tokens=16, ignore_end=True)

    def ask(pair: tuple[int, str]) -> float | None:
        start = time.perf_counter()
        stream = engine.stream(f"{pair[0]}. {PROMPT}", how, model=pair[1])
        next(stream)
        waited = time.perf_counter() - start
        for _ in stream:
            pass
        return waited if pair[1] in hot else None

    with ThreadPoolExecutor(8) as callers:
        waited = [seconds for seconds in callers.map(ask, enumerate(names)) if seconds is not None]
    return float(np.quantile(waited, 0.99))


def _thousand(loaded: LoadedModel, folders: Sequence[Path]) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    chances = 1 / np.arange(1, MANY + 1)
    drawn = generator.choice(MANY, REQUESTS, p=chances / chances.sum())
    names = [folders[number].name for number in drawn]
    few = [folders[number % 5].name for number in drawn]
    page_bytes = 737280
    with _engine(loaded, folders, (2 * HELD + 32 * 4) * page_bytes) as many, _engine(loaded, folders[:5]) as five:
        _rate(five, few[:10])
        pairs = [(_rate(many, names, 16), _rate(five, few, 16)) for _ in range(ROUNDS)]
        hot = {folder.name for folder in folders[:5]}
        waits = [(_first_tokens(many, names, hot), _first_tokens(five, few, hot)) for _ in range(ROUNDS)]
        counted = many.metrics
    kept, hits = counted["adapters_resident"], counted["adapter_hits_total"]
    share = hits / (hits + counted["adapter_misses_total"])
    print(f"1,000 adapters: {kept} in the pool at the end, {share:.0%} of the requests found theirs there", flush=True)
    rates, seconds = zip(*pairs, strict=True), zip(*waits, strict=True)
    return [
        line("1,000 adapters on disk, Zipf", "tokens/s of 5 adapters", *map(list, rates)),
        line("their 5 hottest, first token (p99)", "s with 5 adapters", *map(list, seconds), less=True),
    ]


def _prefix(loaded: LoadedModel) -> dict[str, Any]:
    first, second = [], []
    with _engine(loaded, []) as engine:
        for number in range(ROUNDS):
            shared = engine.encode(f"{number}. " + f"{PROMPT} its river. " * 125)[:1000]
            for times, end in ((first, " The"), (second, " Its")):
                start = time.perf_counter()
                next(engine.stream([*shared, *engine.encode(end)], Sampling(temperature=0.0, max_tokens=2)))
                times.append(time.perf_counter() - start)
    return line("shared prefix of 1,000 tokens, first token", "s of the first request", second, first, less=True)
