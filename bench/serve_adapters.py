"""Many adapters over one base: mixed batches against peers', the cost of adapters, a thousand of them, a shared prefix.

    mixed batch of 8, 32            tokens a second against peft's `generate(adapter_names=...)`, as many rank-16 LoRAs
    mixed batch of 8                tokens a second against llama.cpp's: with the same LoRAs, one after the other, since
                                    it computes one for all rows of a call; and eight together without any, which is
                                    the most that it could reach if it mixed them
    8 adapters, none                tokens a second with, against without
    one adapter, alone              tokens a second beside the weights, against merged into them: in blocks of the same
                                    4 bits, which do not hold them well, and as dense matrices
    1,000 on disk, Zipf             tokens a second with a pool for about 50, against 5 that stay in it; and the time to
                                    the first token of the 5 that are asked for most, 99 of 100 requests within it
    shared prefix of 1,000 tokens   time to the first token of the first request, against the second's

peft holds float32 weights, in a process of its own with OpenMP as it comes; ours stay in their blocks of 4 bits, as
`ftkit serve` leaves them, and are multiplied exactly, or with activations in 8 bits (`--fast-decode`). llama.cpp has
the same file, and activations in 8 bits; it needs the extra `llama`, and its lines are left out without it.
"""

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import _llama
from bench._figures import line, openmp_as_it_comes, smollm2
from ftkit import adapters, models
from ftkit.engine import Engine, Sampling
from ftkit.export import Material, gguf_lora
from ftkit.models import LoadedModel
from ftkit.nn.linear import DenseWeight
from ftkit.quant._packed import round_activations

PROMPT = "The history of the city begins with"
TOKENS = 32
ROUNDS = 3
LONE_ROUNDS = 100  # short ones: the difference is smaller than what else a machine does
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
BATCHES = (8, 32)
MANY, REQUESTS, HELD = 1000, 200, 50


def run() -> list[dict[str, Any]]:
    """One line for each comparison."""
    loaded, rounded = (models.load(smollm2(), quant="gguf") for _ in range(2))
    round_activations(rounded.model)
    with tempfile.TemporaryDirectory() as folder:
        kept = _loras(loaded, Path(folder) / "large", 16, 8)
        small = _loras(loaded, Path(folder) / "small", 4, MANY)
        return [
            *_against_peft(loaded, rounded, kept),
            *_against_llama(loaded, rounded, kept),
            _cost(loaded, kept),
            *_alone(loaded, kept[0]),
            *_thousand(loaded, small),
            _prefix(loaded),
        ]


def _loras(loaded: LoadedModel, folder: Path, rank: int, count: int) -> list[Path]:
    """Random LoRAs on attention's layers."""
    adapters.attach(loaded.model, "lora", {"rank": rank, "target_modules": TARGETS}, seed=0, adapter_id=0)
    generator = torch.Generator().manual_seed(rank)
    folders = [folder / str(number) for number in range(count)]
    for place in folders:
        with torch.no_grad():
            for parameter in adapters.trainable(loaded.model, 0).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        adapters.save(loaded.model, 0, place)
    adapters.detach(loaded.model, 0)
    return folders


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


def _against_peft(loaded: LoadedModel, rounded: LoadedModel, folders: Sequence[Path]) -> list[dict[str, Any]]:
    lines = []
    unit = f"tokens/s of peft ({torch.get_num_threads()} threads)"
    with _peft(folders) as peer, _engine(loaded, folders) as exact, _engine(rounded, folders) as fast:
        for batch in BATCHES:
            names = list(itertools.islice(itertools.cycle(folder.name for folder in folders), batch))
            rates: list[list[float]] = []
            for number in range(1 + ROUNDS):
                peer.send(names)
                found = [peer.recv(), _rate(exact, names), _rate(fast, names)]
                if number:  # the first is to get warm
                    rates.append(found)
            theirs, *ours = (list(column) for column in zip(*rates, strict=True))
            for how, found in zip(("", ", --fast-decode"), ours, strict=True):
                lines.append(line(f"mixed adapters, batch {batch}{how}", unit, found, theirs))
    return lines


@contextmanager
def _peft(folders: Sequence[Path]) -> Iterator[Connection]:
    """A process that takes a batch's names and answers with its tokens a second."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_generate, args=(theirs, folders), daemon=True)
    with openmp_as_it_comes():
        process.start()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _generate(asked: Connection, folders: Sequence[Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2()
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = PeftModel.from_pretrained(base, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    while True:
        try:
            names = asked.recv()
        except EOFError:
            return
        given = tokenizer([PROMPT] * len(names), return_tensors="pt")
        start = time.perf_counter()
        model.generate(**given, adapter_names=names, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        asked.send(len(names) * TOKENS / (time.perf_counter() - start))


def _against_llama(loaded: LoadedModel, rounded: LoadedModel, folders: Sequence[Path]) -> list[dict[str, Any]]:
    if not _llama.installed("serve_adapters: llama.cpp"):
        return []
    files = [_gguf(loaded, folder) for folder in folders]
    names = [folder.name for folder in folders]
    greedy = Sampling(temperature=0.0, max_tokens=_llama.TOKENS, ignore_end=True)
    threads = torch.get_num_threads()
    rates: list[list[float]] = []
    with (
        _llama.Peer(smollm2(), threads, files) as peer,
        _engine(loaded, folders) as exact,
        _engine(rounded, folders) as fast,
    ):
        for number in range(1 + ROUNDS):
            # other tokens each time: neither side may remember them
            prompt = [1000 + 600 * number + at for at in range(_llama.TOKENS)]
            found = [peer.measure(what, prompt) for what in ("adapters", "together")]
            for engine in (exact, fast):
                start = time.perf_counter()
                engine.generate_many([prompt[at : at + 1] for at in range(len(names))], greedy, model=names)
                found.append(len(names) * _llama.TOKENS / (time.perf_counter() - start))
            if number:  # the first is to get warm
                rates.append(found)
    adapted, plain, *ours = (list(column) for column in zip(*rates, strict=True))
    lines = []
    for how, rate in zip(("", ", --fast-decode"), ours, strict=True):
        for which, theirs in (("with the same LoRAs", adapted), ("without LoRA", plain)):
            unit = f"tokens/s of llama.cpp {which} ({threads} threads)"
            lines.append(line(f"mixed adapters, batch {len(names)}{how}", unit, rate, theirs))
    return lines


def _gguf(loaded: LoadedModel, folder: Path) -> Path:
    """The LoRA of a directory, as a file that llama.cpp reads."""
    path = folder / "lora.gguf"
    adapters.load(loaded.model, folder, 0)
    try:
        gguf_lora.write(Material(loaded=loaded, adapter_id=0, tensors={}, changed=frozenset()), path, "f32")
    finally:
        adapters.detach(loaded.model, 0)
    return path


def _cost(loaded: LoadedModel, folders: Sequence[Path]) -> dict[str, Any]:
    names = [folder.name for folder in folders]
    with _engine(loaded, folders) as engine:
        _rate(engine, names)
        pairs = [(_rate(engine, names), _rate(engine, [None] * len(names))) for _ in range(ROUNDS)]
    unit = "tokens/s without adapters"
    return line("8 adapters of rank 16", unit, [ours for ours, _ in pairs], [none for _, none in pairs])


def _decoding(engine: Engine, name: str | None) -> float:
    """Tokens a second of an answer after its first."""
    stream = engine.stream(PROMPT, Sampling(temperature=0.0, max_tokens=TOKENS, ignore_end=True), model=name)
    left = TOKENS - len(next(stream).tokens)
    start = time.perf_counter()
    for _ in stream:
        pass
    return left / (time.perf_counter() - start)


def _alone(loaded: LoadedModel, folder: Path) -> list[dict[str, Any]]:
    adapters.load(loaded.model, folder, 0)
    merged = adapters.merged(loaded.model, 0)
    adapters.detach(loaded.model, 0)
    blocks, dense = (models.load(smollm2(), quant="gguf") for _ in range(2))
    for peer in (blocks, dense):
        for name, linear in peer.model.linears().items():
            if name.endswith(TARGETS):
                weight = merged[f"{name}.weight"]
                linear.weight = DenseWeight(weight) if peer is dense else linear.weight.replace_dense(weight)
    rates: list[list[float]] = []
    with _engine(loaded, [folder]) as ours, _engine(blocks, []) as same, _engine(dense, []) as plain:
        for number in range(1 + LONE_ROUNDS):
            found = [_decoding(ours, folder.name), _decoding(same, None), _decoding(plain, None)]
            if number:  # the first is to get warm
                rates.append(found)
    beside, *peers = (list(column) for column in zip(*rates, strict=True))
    units = ("tokens/s merged into blocks of 4 bits", "tokens/s merged into dense matrices")
    return [
        line("one adapter of rank 16, alone", unit, beside, theirs) for unit, theirs in zip(units, peers, strict=True)
    ]


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
    pages, page_bytes = 3, 737280  # of an adapter; of 32 requests each, as well
    with _engine(loaded, folders, pages * (HELD + 32) * page_bytes) as many, _engine(loaded, folders[:5]) as five:
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
