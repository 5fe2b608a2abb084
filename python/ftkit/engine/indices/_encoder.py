"""Texts as vectors: a model's hidden states after the final norm, averaged over the tokens, of length 1."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftkit.engine.engine import Engine
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch

_BATCH_TOKENS = 2048


class Encoder:
    """Embeds with a model, without any adapter."""

    def __init__(self, loaded: LoadedModel, lock: Any = None) -> None:
        """`lock` is held while the model is used; the engine's, if it is the engine's model."""
        self._loaded = loaded
        self._lock = contextlib.nullcontext() if lock is None else lock
        self.fingerprint = loaded.fingerprint
        """Tells vectors of different models apart."""

    def one(self, text: str) -> Tensor:
        """The vector of a text, float32 [d] on the CPU. By itself, so that it doesn't depend on others."""
        return self._vectors([self._tokens(text)])[0]

    def many(self, texts: Sequence[str]) -> Tensor:
        """The vectors of texts, float32 [n, d] on the CPU."""
        rows = [self._tokens(text) for text in texts]
        found = torch.empty((len(rows), self._loaded.config.hidden_size))
        batch: list[int] = []
        for number in sorted(range(len(rows)), key=lambda number: len(rows[number])):
            if batch and (len(batch) + 1) * len(rows[number]) > _BATCH_TOKENS:
                found[batch] = self._vectors([rows[row] for row in batch])
                batch = []
            batch.append(number)
        if batch:
            found[batch] = self._vectors([rows[row] for row in batch])
        return found

    def _tokens(self, text: str) -> list[int]:
        tokens = self._loaded.tokenizer.encode(text, False)[: self._loaded.config.context_length]
        return tokens or self._loaded.tokenizer.encode(" ", False) or [0]

    def _vectors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        model = self._loaded.model
        with self._lock, torch.inference_mode():
            hidden = model(RaggedBatch.pack(rows, device=model.device)).float()  # [tokens, d]
            means = torch.stack([part.mean(0) for part in hidden.split([len(row) for row in rows])])
            return torch.nn.functional.normalize(means, dim=1).cpu()


def encoder_of(model: LoadedModel | Engine) -> Encoder:
    """What embeds with a model, or with the one that an engine serves, between its steps."""
    if isinstance(model, Engine):
        return Encoder(model.loaded, model._step.lock)
    return Encoder(model)
