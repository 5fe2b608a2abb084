"""Serving a GGUF file against llama.cpp: the same file and threads, in turns, each in a process of its own.

Ours is measured twice: with activations as they are (`exact`), and rounded to 8 bits as llama.cpp always does (`fast`:
`--fast-decode`). Ours is measured from request to answer, sampling included; of llama.cpp only `llama_decode` is, with
flash attention, which is faster there. Needs the extra `llama`, and is left out without it. The roof of decoding is the
machine's memory bandwidth: a token reads every block once.
"""

import importlib.util
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench._figures import bandwidth, line, openmp_as_it_comes, smollm2
from ftkit.engine import Engine, Sampling, launch

TYPES = ("q4_1", "q4_0", "q8_0", "q4_k_m", "q6_k")
TOKENS = 64
PROMPT = 512
TOGETHER = 8
ROUNDS = 3
_CONTEXT = TOGETHER * PROMPT  # llama.cpp gives each sequence its part


def run() -> list[dict[str, Any]]:
    """Tokens a second, decoding one answer and eight together and reading a prompt, for each type."""
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
    unit = f"tokens/s of llama.cpp ({kind}, {threads} threads)"
    figures: dict[str, list[list[float]]] = {"exact": [], "fast": [], "theirs": []}
    with (
        launch(path, pool_bytes=256 << 20) as exact,
        launch(path, pool_bytes=256 << 20, fast_decode=True) as fast,
        _Peer(path, threads) as peer,
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


class _Peer:
    """llama.cpp in a process of its own; where its buffers for AMX crash it, without them."""

    def __init__(self, path: Path, threads: int) -> None:
        self.arguments, self.plain = (str(path), threads), False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.arguments, self.plain), daemon=True)
        with openmp_as_it_comes():
            self.process.start()
        theirs.close()

    def measure(self, what: str, prompt: list[int]) -> float:
        """Tokens a second."""
        try:
            self.pipe.send((what, prompt))
            found: float = self.pipe.recv()
        except (EOFError, ConnectionError):
            if self.plain:
                raise
            self.plain = True
            print("llama_cpp: crashed with its packed weights; measured without them", file=sys.stderr)
            self._start()
            return self.measure(what, prompt)
        return found

    def __enter__(self) -> "_Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()


def _serve(pipe: Any, path: str, threads: int, plain: bool) -> None:
    """Answers (what, tokens) with tokens a second."""
    import llama_cpp as api

    api.llama_log_set(_QUIET := api.llama_log_callback(lambda *_: None), None)
    model_options = api.llama_model_default_params()
    model_options.use_extra_bufts = not plain
    model = api.llama_model_load_from_file(path.encode(), model_options)
    options = api.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = _CONTEXT, PROMPT, PROMPT, TOGETHER
    options.n_threads = options.n_threads_batch = threads
    options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = api.llama_init_from_model(model, options)
    batch = api.llama_batch_init(PROMPT, 0, 1)

    def decode(rows: list[tuple[int, int, int]]) -> None:
        """(token, position, sequence), logits of each sequence's last."""
        batch.n_tokens = len(rows)
        for at, (token, position, sequence) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = at + 1 == len(rows) or rows[at + 1][2] != sequence
        if api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        api.llama_synchronize(context)

    while True:
        what, prompt = pipe.recv()
        api.llama_memory_clear(api.llama_get_memory(context), True)
        start = time.perf_counter()
        if what == "prompt":
            decode([(token, at, 0) for at, token in enumerate(prompt)])
            count = len(prompt)
        else:
            sequences = TOGETHER if what == "together" else 1
            for at in range(TOKENS):
                decode([(prompt[at] + sequence, at, sequence) for sequence in range(sequences)])
            count = sequences * TOKENS
        pipe.send(count / (time.perf_counter() - start))
