"""Single-stream decoding against transformers: same model, precision, threads and tokens, in turns.

The roof is the machine's memory bandwidth: a token reads every weight of the layers and the head once.
"""

import time
from typing import Any

import torch

from bench._figures import bandwidth, line, smollm2
from ftkit import models
from ftkit.engine import Engine, Sampling

PROMPT = "The history of the city begins with"
TOKENS = 48
ROUNDS = 3


def run() -> dict[str, Any]:
    """Tokens a second after the first token, ours and theirs, on SmolLM2."""
    from transformers import AutoModelForCausalLM

    model = smollm2()
    loaded = models.load(model)
    theirs = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).eval()
    pairs = []
    with Engine(loaded, pool_bytes=256 << 20) as engine:
        prompt = engine.encode(PROMPT)
        _ours(engine, prompt), _theirs(theirs, prompt)
        pairs = [(_ours(engine, prompt), _theirs(theirs, prompt)) for _ in range(ROUNDS)]
    read = sum(linear.weight.nbytes for linear in loaded.model.linears().values())
    return line(
        "decode",
        f"tokens/s of transformers (one stream, float32, {torch.get_num_threads()} threads)",
        [ours for ours, _ in pairs],
        [peer for _, peer in pairs],
        roof=bandwidth() / read,
    )


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
