"""Cosine of a model's embeddings, exactly, against every passage: what is meant rather than which words.

    score(q, d) = e(q) · e(d),   e the mean of the hidden states after the final norm, of length 1

The embeddings are those of the served model without adapter, or of a model that is given. Embedding the passages
takes as long as prompting the model with all of them, once.

Source: Reimers and Gurevych, Sentence-BERT, 2019, arXiv 1908.10084 (the mean over tokens).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftkit.engine.indices._encoder import Encoder
from ftkit.errors import InputError

_FILE = "embeddings.safetensors"
_PORTION = 256
_LEAST_COLUMNS = 4
_MARGIN = 8
"""Passages beyond those wanted that are scored anew: products of matrices round differently in different company."""


def build(texts: Sequence[str], folder: Path, encoder: Encoder | None) -> None:
    """Embeds the texts, and says in a terminal how far it is."""
    encoder = _needed(encoder)
    parts = []
    for start in range(0, len(texts), _PORTION):
        parts.append(encoder.many(texts[start : start + _PORTION]))
        if len(texts) > _PORTION and sys.stderr.isatty():  # where nobody parses it
            done = min(start + _PORTION, len(texts))
            print(f"embedding: {done:,} of {len(texts):,} passages", file=sys.stderr, flush=True)
    save_file({"embeddings": torch.cat(parts)}, folder / _FILE)


def load(folder: Path, encoder: Encoder | None) -> "Dense":
    """Opens an index."""
    return Dense(load_file(folder / _FILE)["embeddings"], _needed(encoder))


class Dense:
    """An `Index` of vectors, float32 [n, d]."""

    def __init__(self, vectors: Tensor, encoder: Encoder) -> None:
        self._vectors, self._encoder = vectors, encoder

    def query(self, text: str) -> Tensor:
        """The text's vector, float32 [d]."""
        return self._encoder.one(text)

    def search(self, queries: Sequence[Tensor], count: int) -> list[list[int]]:
        """As `Index.search`; one product for all queries."""
        scores = self._scores(torch.stack(list(queries)))  # [queries, n]
        best = scores.topk(min(count + _MARGIN, len(self._vectors)), dim=1).indices
        return [self.rank(query, row.tolist())[:count] for query, row in zip(queries, best, strict=True)]

    def _scores(self, queries: Tensor) -> Tensor:
        # Passages times queries, not the other way round, and never one query alone: several columns are as fast as
        # memory is, where a product with one is a loop of one thread, and one with few rows packs all of the passages.
        columns = torch.nn.functional.pad(queries, (0, 0, 0, max(0, _LEAST_COLUMNS - len(queries))))
        return (self._vectors @ columns.T).T[: len(queries)].contiguous()

    def rank(self, query: Tensor, passages: Sequence[int]) -> list[int]:
        """As `Index.rank`; a passage's score depends on it and the query alone."""
        scores = (self._vectors[list(passages)].double() * query.double()).sum(1).tolist()
        return [number for _, number in sorted(zip((-score for score in scores), passages, strict=True))]


def _needed(encoder: Encoder | None) -> Encoder:
    if encoder is None:
        raise InputError("dense: expected a model that embeds, got none")
    return encoder
