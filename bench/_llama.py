"""llama.cpp as a peer: what it does in a second, in a process of its own, through llama-cpp-python's bare functions.

decode      one sequence, a token a call
together    eight sequences, a token of each a call
prompt      a prompt's tokens in one call
adapters    a sequence under each LoRA: a call computes one LoRA for all its rows, so one is decoded after the other

Only `llama_decode` is measured, with flash attention, which is faster there; no token is sampled.
"""

import ctypes
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench._figures import openmp_as_it_comes

TOKENS = 64
PROMPT = 512
TOGETHER = 8
_CONTEXT = TOGETHER * PROMPT  # llama.cpp gives each sequence its part


def installed(who: str) -> bool:
    """Whether the package is there; where it isn't, says what `who` leaves out."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return True
    print(f"{who}: left out, the package llama-cpp-python is not installed (uv sync --extra llama)", file=sys.stderr)
    return False


class Peer:
    """llama.cpp in a process of its own; where its buffers for AMX crash it, without them."""

    def __init__(self, path: Path, threads: int, loras: Sequence[Path] = ()) -> None:
        """`loras`: files of adapters, as `ftkit export --to gguf-lora` writes them."""
        self.arguments, self.plain = (str(path), threads, [str(lora) for lora in loras]), False
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

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()


def _serve(pipe: Any, path: str, threads: int, loras: list[str], plain: bool) -> None:
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
    # before the context, which makes room for what they add to its graph
    adapters = [_lora(api, model, lora) for lora in loras]
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

    def put_on(chosen: list[Any]) -> None:
        """These LoRAs, and no others, are added to the rows of the calls to come."""
        count = len(chosen)
        pointers, scales = (api.llama_adapter_lora_p_ctypes * count)(*chosen), (ctypes.c_float * count)(*[1.0] * count)
        if api.llama_set_adapters_lora(context, pointers, count, scales):
            raise RuntimeError("llama_set_adapters_lora failed")

    while True:
        what, prompt = pipe.recv()
        api.llama_memory_clear(api.llama_get_memory(context), True)
        put_on([])
        start = time.perf_counter()
        if what == "prompt":
            decode([(token, at, 0) for at, token in enumerate(prompt)])
            count = len(prompt)
        elif what == "adapters":
            for sequence, adapter in enumerate(adapters):
                put_on([adapter])
                for at in range(TOKENS):
                    decode([(prompt[at] + sequence, at, sequence)])
            count = len(adapters) * TOKENS
        else:
            sequences = TOGETHER if what == "together" else 1
            for at in range(TOKENS):
                decode([(prompt[at] + sequence, at, sequence) for sequence in range(sequences)])
            count = sequences * TOKENS
        pipe.send(count / (time.perf_counter() - start))


def _lora(api: Any, model: Any, path: str) -> Any:
    adapter = api.llama_adapter_lora_init(model, path.encode())
    if not adapter:
        raise RuntimeError(f"llama.cpp cannot read {path}")
    return adapter
