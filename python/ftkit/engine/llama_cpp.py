"""The same questions to llama.cpp: another runtime for GGUF files, to compare with.

Needs the extra `llama` (the package llama-cpp-python).
"""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftkit.engine.conversation import Message
from ftkit.engine.engine import Delta
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError


class LlamaCpp:
    """A GGUF file in llama.cpp, with the part of the engine's interface that a chat uses."""

    def __init__(self, path: Path, context_tokens: int = 0) -> None:
        """Loads the file. Raises InputError when it is none, or the package is not installed."""
        if path.suffix != ".gguf" or not path.is_file():
            raise InputError(
                f"--engine llama-cpp: expected a .gguf file, got {path}", "ftkit export --to gguf makes one"
            )
        try:
            package: Any = importlib.import_module("llama_cpp")
        except ImportError:
            raise InputError(
                "--engine llama-cpp: expected the package llama-cpp-python, got none", "pip install 'ftkit[llama]'"
            ) from None
        self._model = package.Llama(model_path=str(path), n_ctx=context_tokens, verbose=False)
        self.context_tokens: int = self._model.n_ctx()

    def stream(self, messages: Sequence[Message], sampling: Sampling, *, model: str | None = None) -> Iterator[Delta]:
        """An answer as it grows; `model` must be None, since adapters are not loaded here."""
        assert model is None
        parts = self._model.create_chat_completion(
            messages=list(messages),
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repeat_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop=list(sampling.stop) or None,
            stream=True,
        )
        generated = 0
        for part in parts:
            choice = part["choices"][0]
            text = choice["delta"].get("content") or ""
            generated += bool(text)
            reason = choice.get("finish_reason")
            yield Delta(text=text, tokens=(), finish_reason=reason, completion_tokens=generated if reason else 0)

    def close(self) -> None:
        """Frees the model."""
        self._model.close()
