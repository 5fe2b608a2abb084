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
from ftkit.kernels.block_matmul import block_matmul

_FILE = "embeddings.safetensors"
_PORTION = 256
_MARGIN = 8
"""Passages beyond those wanted that are scored anew, as `rank` does: the product of all is in float32."""


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
        self._vectors, self._encoder = vectors.contiguous(), encoder

    def query(self, text: str) -> Tensor:
        """The text's vector, float32 [d]."""
        return self._encoder.one(text)

    def search(self, queries: Sequence[Tensor], count: int) -> list[list[int]]:
        """As `Index.search`; one product for all queries."""
        # several queries cost little more than one, up to eight or so: all passages are read once
        scores = block_matmul(torch.stack(list(queries)), "f32", self._vectors.view(torch.uint8))  # [queries, n]
        best = scores.topk(min(count + _MARGIN, len(self._vectors)), dim=1).indices
        return [self.rank(query, row.tolist())[:count] for query, row in zip(queries, best, strict=True)]

    def rank(self, query: Tensor, passages: Sequence[int]) -> list[int]:
        """As `Index.rank`; a passage's score depends on it and the query alone."""
        scores = (self._vectors[list(passages)].double() * query.double()).sum(1).tolist()
        return [number for _, number in sorted(zip((-score for score in scores), passages, strict=True))]


def _needed(encoder: Encoder | None) -> Encoder:
    if encoder is None:
        raise InputError("dense: expected a model that embeds, got none")
    return encoder
