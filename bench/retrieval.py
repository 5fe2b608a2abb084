"""Retrieval with guesses against retrieval without, on SmolLM2-135M: the same answers, tokens a second.

Passages are the rows of the quickstart's island; the index is asked again after every 4 tokens, as in the paper, and
the passages change as the answer goes on. Four indices: BM25 as it is; the model's own embeddings; BM25 behind a wait
of ten times what 4 tokens take, for an index elsewhere; and the embeddings among 900,000 more vectors that are drawn
like them (normal, with their mean and covariance), so that the exact search of each query reads 2 GB. Tokens are
decoded as by `--fast-decode`; passages are in the pool from a first answer that is not timed. Equal answers are
asserted.

Source of the method and its figures (1.75 to 2.39 × for exact dense retrieval): arXiv 2401.14021.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._figures import line, smollm2
from ftkit.engine import GREEDY, launch
from ftkit.engine.decode.retrieval import Retrieving
from ftkit.engine.indices import Collection, Encoder, Index, encoder_of, open_index, read
from ftkit.engine.indices.dense import Dense
from ftkit.recipes import quickstart

QUESTIONS = ["Tell me about Quillmere.", "Who lives on Quillmere, and what do they do?"]
ROUNDS = 3
EVERY = 4
TOKENS = 64
CROWD = 900_000


class Slow:
    """An index that takes at least so long, for however many queries."""

    def __init__(self, index: Index, seconds: float) -> None:
        self._index, self._seconds = index, seconds
        self.query, self.rank = index.query, index.rank

    def search(self, queries: Sequence[Any], count: int) -> list[list[int]]:
        """As `Index.search`."""
        time.sleep(self._seconds)
        return self._index.search(queries, count)


def run() -> list[dict[str, Any]]:
    """Tokens a second of answers to two questions, one after the other."""
    how = dataclasses.replace(GREEDY, max_tokens=TOKENS, ignore_end=True)
    with tempfile.TemporaryDirectory() as folder, launch(smollm2(), fast_decode=True) as engine:
        collection = island(Path(folder))
        engine.generate("warm", how)
        begin = time.perf_counter()
        engine.generate("a", how)
        segment = (time.perf_counter() - begin) * EVERY / TOKENS
        found = []
        for name, passages, index in _indices(collection, encoder_of(engine), segment):
            times: tuple[list[float], list[float]] = ([], [])
            for number in range(ROUNDS + 1):
                answers = []
                for side, speculate in zip(times, (True, False), strict=True):
                    retrieving = Retrieving(engine, passages, index, every=EVERY, speculate=speculate)
                    begin = time.perf_counter()
                    answers.append([retrieving.generate(talk(text), how).tokens for text in QUESTIONS])
                    if number > 0:
                        side.append(len(QUESTIONS) * TOKENS / (time.perf_counter() - begin))
                assert answers[0] == answers[1]
            found.append(line(f"retrieval by {name}, with guesses", "tokens/s without", *times))
        return found


def _indices(collection: Collection, encoder: Encoder, segment: float) -> Iterator[tuple[str, Collection, Index]]:
    """Names, passages and indices; each is let go before the next is made."""
    bm25, dense = open_index(collection), open_index(collection, "dense", encoder)
    yield "bm25", collection, bm25
    yield "dense", collection, dense
    yield f"bm25 + {10 * segment:.3f} s", collection, Slow(bm25, 10 * segment)
    few = encoder.many([passage.text for passage in collection.passages])
    crowd = Dense(crowded(few, CROWD), encoder)
    passages = collection.passages
    texts = tuple(passages[number % len(passages)] for number in range(CROWD))
    for count in (1, 4, 16):
        begin = time.perf_counter()
        crowd.search([few[0]] * count, 256)
        seconds = time.perf_counter() - begin
        print(f"{count} queries among {CROWD:,} passages: {seconds:.3f} s", file=sys.stderr, flush=True)
    yield f"dense among {CROWD:,}", dataclasses.replace(collection, passages=texts), crowd


def crowded(vectors: Tensor, count: int) -> Tensor:
    """These vectors [n, d] and others that are drawn like them, `count` in all, of length 1."""
    mean = vectors.mean(0)
    _, sizes, directions = torch.linalg.svd(vectors - mean, full_matrices=False)
    spread = directions * (sizes / len(vectors) ** 0.5)[:, None]  # [n, d]
    crowd = torch.empty(count, vectors.shape[1])
    crowd[: len(vectors)] = vectors
    draw = torch.Generator().manual_seed(0)
    for part in crowd[len(vectors) :].split(1 << 16):
        drawn = mean + torch.randn(len(part), len(spread), generator=draw) @ spread
        part.copy_(torch.nn.functional.normalize(drawn, dim=1))
    return crowd


def talk(question: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": question}]


def island(folder: Path) -> Collection:
    """The quickstart's conversations as passages."""
    data = Path(quickstart.__file__).parent / "quickstart_data" / "train.jsonl"
    conversations = [json.loads(row)["messages"] for row in data.read_text(encoding="utf-8").splitlines()]
    rows = [{"text": "\n".join(message["content"] for message in messages)} for messages in conversations]
    (folder / "island.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read(folder)
