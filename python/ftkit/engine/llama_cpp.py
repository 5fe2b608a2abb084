"""The same questions to llama.cpp: another runtime for GGUF files, to compare with.

Needs the extra `llama` (the package llama-cpp-python). Prompts become tokens as they do for our engine, so what differs
is the runtime.
"""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftkit import _core
from ftkit.engine.conversation import Message
from ftkit.engine.engine import Delta
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError


class LlamaCpp:
    """A GGUF file in llama.cpp, with the part of the engine's interface that a chat uses."""

    def __init__(self, path: Path, context_tokens: int = 0) -> None:
        """Loads the file. Raises InputError when it is none, has no chat template, or the package is not installed."""
        self._model = open_model(path, n_ctx=context_tokens)
        self._tokenizer = _core.Tokenizer.from_gguf(path)
        template = _core.ChatTemplate.from_gguf(path)
        if template is None:
            raise InputError(f"{path}: expected a model with a chat template, got one without")
        self._template = template
        self.context_tokens: int = self._model.n_ctx()

    def stream(self, messages: Sequence[Message], sampling: Sampling, *, model: str | None = None) -> Iterator[Delta]:
        """An answer as it grows; `model` must be None, since adapters are not loaded here."""
        assert model is None
        prompt = _core.encode_prompt(self._template, self._tokenizer, messages)
        room = self.context_tokens - len(prompt)
        if room < 1:
            raise InputError(f"prompt: expected fewer than {self.context_tokens} tokens, got {len(prompt)}")
        most = min(room, sampling.max_tokens or room)
        if sampling.seed is not None:
            self._model.set_seed(sampling.seed % 2**32)
        tokens = self._model.generate(
            prompt,
            temp=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repeat_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
        )
        decoder = self._tokenizer.stream()
        for count, token in enumerate(tokens, 1):
            ended = token in self._tokenizer.end_ids
            text = "" if ended else decoder.push(token)
            if ended or count == most:
                reason = "stop" if ended else "length"
                text += decoder.finish()
                yield Delta(
                    text=text, tokens=(), finish_reason=reason, prompt_tokens=len(prompt), completion_tokens=count
                )
                return
            yield Delta(text=text, tokens=())

    def close(self) -> None:
        """Frees the model."""
        self._model.close()


def open_model(path: Path, **options: Any) -> Any:
    """A `llama_cpp.Llama` of a GGUF file. Raises InputError when it is none, or the package is not installed."""
    if path.suffix != ".gguf" or not path.is_file():
        raise InputError(f"--engine llama-cpp: expected a .gguf file, got {path}", "ftkit export --to gguf makes one")
    try:
        package: Any = importlib.import_module("llama_cpp")
    except ImportError:
        raise InputError(
            "--engine llama-cpp: expected the package llama-cpp-python, got none", "pip install 'ftkit[llama]'"
        ) from None
    api, defaults = package.llama_cpp, package.llama_cpp.llama_model_default_params
    if b"AMX_INT8 = 1" in api.llama_print_system_info():
        # builds with AMX crash at the first token (github.com/ggml-org/llama.cpp/issues/20824): without the buffers
        # that repack weights, AMX is not used; `Llama` doesn't let one choose
        api.llama_model_default_params = lambda: _plain_buffers(defaults())
    try:
        return package.Llama(model_path=str(path), verbose=False, **options)
    except ValueError as error:
        raise InputError(f"{path}: expected a file that llama.cpp reads, got: {str(error).lower()}") from None
    finally:
        api.llama_model_default_params = defaults


def _plain_buffers(parameters: Any) -> Any:
    parameters.use_extra_bufts = False
    return parameters
