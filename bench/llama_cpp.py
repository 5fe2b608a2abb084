"""Serving a GGUF file against llama.cpp: the same file, threads and greedy tokens, in turns.

Ours multiplies float32 activations; llama.cpp rounds them to 8 bits first. Needs the extra `llama`, and is left out
without it. The roof of decoding is the machine's memory bandwidth: a token reads every block once.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench._figures import bandwidth, line, smollm2
from ftkit.engine import Engine, Sampling, launch
from ftkit.engine.llama_cpp import open_model

TYPES = ("q4_1", "q4_0", "q8_0")
TOKENS = 64
PROMPT = 512
ROUNDS = 3


def run() -> list[dict[str, Any]]:
    """Tokens a second, decoding one answer and reading a prompt, for each type."""
    if importlib.util.find_spec("llama_cpp") is None:
        print(
            "llama_cpp: left out, the package llama-cpp-python is not installed (uv sync --extra llama)",
            file=sys.stderr,
        )
        return []
    found = []
    with tempfile.TemporaryDirectory() as place:
        for kind in TYPES:
            found += _type(kind, _file(kind, Path(place)))
    return found


def _file(kind: str, place: Path) -> Path:
    if kind == "q4_1":
        return smollm2()
    path = place / f"{kind}.gguf"
    words = ["export", str(smollm2()), "--to", "gguf", "--type", kind, "--out", str(path)]
    subprocess.run([sys.executable, "-m", "ftkit", *words], check=True, capture_output=True)
    return path


def _type(kind: str, path: Path) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    theirs = open_model(path, n_ctx=PROMPT + TOKENS + 8, n_threads=threads, n_threads_batch=threads, n_batch=PROMPT)
    prompt = list(range(1000, 1000 + PROMPT))
    decode: list[tuple[float, float]] = []
    read: list[tuple[float, float]] = []
    with launch(path, pool_bytes=256 << 20) as engine:
        for number in range(ROUNDS + 1):
            # a prompt of other tokens each time: neither side may remember it
            tokens = [token + 600 * number for token in prompt]
            pairs = list(zip(_ours(engine, tokens), _theirs(theirs, tokens), strict=True))
            if number:  # the first warms up
                decode.append(pairs[0])
                read.append(pairs[1])
        weights = engine.loaded.model.linears().values()
        roof = bandwidth() / sum(linear.weight.nbytes for linear in weights)
    theirs.close()
    unit = f"tokens/s of llama.cpp ({kind}, {threads} threads)"
    return [
        line(f"decode {kind}", unit, [a for a, _ in decode], [b for _, b in decode], roof=roof),
        line(f"prompt of {PROMPT} {kind}", unit, [a for a, _ in read], [b for _, b in read]),
    ]


def _ours(engine: Engine, prompt: list[int]) -> tuple[float, float]:
    """(decoded, read) tokens a second."""
    times = [time.perf_counter()]
    for _ in engine.stream(prompt[:16], Sampling(temperature=0.0, max_tokens=TOKENS, ignore_end=True, logprobs=0)):
        times.append(time.perf_counter())
    start = time.perf_counter()
    engine.generate(prompt, Sampling(temperature=0.0, max_tokens=1, ignore_end=True))
    return (TOKENS - 1) / (times[-1] - times[1]), PROMPT / (time.perf_counter() - start)


def _theirs(model: Any, prompt: list[int]) -> tuple[float, float]:
    model.reset()
    times = []
    for _, _ in zip(model.generate(prompt[:16], temp=0.0), range(TOKENS), strict=False):
        times.append(time.perf_counter())
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    return (TOKENS - 1) / (times[-1] - times[0]), PROMPT / (time.perf_counter() - start)
