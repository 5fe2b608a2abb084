"""Retrieval with guesses against retrieval without, on SmolLM2-135M: the same answers, tokens a second.

Passages are the rows of the quickstart's island; the index is asked again after every 8 tokens, and the passages change
as the answer goes on. Three indices: BM25 as it is; the model's own embeddings; and one that takes ten times as long as
8 tokens, as one of many millions of passages does. Equal answers are asserted.

Source of the method and its figures (1.75 to 2.39 × for exact dense retrieval): arXiv 2401.14021.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench._figures import line, smollm2
from ftkit.engine import GREEDY, launch
from ftkit.engine.decode.retrieval import Retrieving
from ftkit.engine.indices import Collection, Index, encoder_of, open_index, read
from ftkit.recipes import quickstart

QUESTIONS = ["Tell me about Quillmere.", "Who lives on Quillmere, and what do they do?"]
ROUNDS = 3
EVERY = 8
TOKENS = 64


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
    with tempfile.TemporaryDirectory() as folder, launch(smollm2()) as engine:
        collection = island(Path(folder))
        engine.generate("warm", how)
        begin = time.perf_counter()
        engine.generate("a", how)
        segment = (time.perf_counter() - begin) * EVERY / TOKENS
        bm25, dense = open_index(collection), open_index(collection, "dense", encoder_of(engine))
        indices = {"bm25": bm25, "dense": dense, f"bm25 + {10 * segment:.3f} s": Slow(bm25, 10 * segment)}
        found = []
        for name, index in indices.items():
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                answers = []
                for side, speculate in zip(times, (True, False), strict=True):
                    retrieving = Retrieving(engine, collection, index, every=EVERY, speculate=speculate)
                    begin = time.perf_counter()
                    answers.append([retrieving.generate(talk(text), how).tokens for text in QUESTIONS])
                    side.append(len(QUESTIONS) * TOKENS / (time.perf_counter() - begin))
                assert answers[0] == answers[1]
            found.append(line(f"retrieval by {name}, with guesses", "tokens/s without", *times))
        return found


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
