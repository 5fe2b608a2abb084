"""Serving a GGUF file against llama.cpp: the same file and threads, in turns, each in a process of its own.

Ours is measured twice: with activations as they are (`exact`), and rounded to 8 bits as llama.cpp always does (`fast`:
`--fast-decode`). Ours is measured from request to answer, sampling included; of llama.cpp only `llama_decode` is. Needs
the extra `llama`, and is left out without it. The roof of decoding is the machine's memory bandwidth: a token reads
every block once.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench._figures import bandwidth, line, smollm2
from bench._llama import PROMPT, TOGETHER, TOKENS, Peer, installed
from ftkit.engine import Engine, Sampling, launch

TYPES = ("q4_1", "q4_0", "q8_0", "q4_k_m", "q6_k")
ROUNDS = 3


def run() -> list[dict[str, Any]]:
    """Tokens a second, decoding one answer and eight together and reading a prompt, for each type."""
    if not installed("llama_cpp"):
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
    unit = f"tokens/s of llama.cpp ({kind}, {threads} threads)"
    figures: dict[str, list[list[float]]] = {"exact": [], "fast": [], "theirs": []}
    with (
        launch(path, pool_bytes=256 << 20) as exact,
        launch(path, pool_bytes=256 << 20, fast_decode=True) as fast,
        Peer(path, threads) as peer,
    ):
        for number in range(ROUNDS + 1):
            # other tokens each time: neither side may remember them
            prompt = [1000 + 600 * number + at for at in range(PROMPT)]
            sides: dict[str, Callable[[str, list[int]], float]] = {
                "exact": lambda what, tokens: _ours(exact, what, tokens),
                "fast": lambda what, tokens: _ours(fast, what, tokens),
                "theirs": peer.measure,
            }
            for name, measure in sides.items():
                found = [measure(what, prompt) for what in ("decode", "together", "prompt")]
                if number:  # the first warms up
                    figures[name].append(found)
        weights = exact.loaded.model.linears().values()
        roof = bandwidth() / sum(linear.weight.nbytes for linear in weights)
    lines = []
    for at, name in enumerate((f"decode {kind}", f"decode {TOGETHER} together {kind}", f"prompt of {PROMPT} {kind}")):
        theirs = [found[at] for found in figures["theirs"]]
        for mode in ("exact", "fast"):
            ours = [found[at] for found in figures[mode]]
            lines.append(line(f"{name} {mode}", unit, ours, theirs, roof=None if at else roof))
    return lines


def _ours(engine: Engine, what: str, prompt: list[int]) -> float:
    greedy = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_end=True)
    start = time.perf_counter()
    if what == "prompt":
        engine.generate(prompt, Sampling(temperature=0.0, max_tokens=1, ignore_end=True))
        return PROMPT / (time.perf_counter() - start)
    if what == "together":
        engine.generate_many([prompt[at : at + 1] for at in range(TOGETHER)], greedy)
        return TOGETHER * TOKENS / (time.perf_counter() - start)
    engine.generate(prompt[:1], greedy)
    return TOKENS / (time.perf_counter() - start)
