"""BM25 over the words of passages, by tantivy: names, numbers and rare words; needs the extra `retrieval`.

    score(q, d) = Σ over words t of q:  idf(t) · f(t, d) · (k₁ + 1) / (f(t, d) + k₁ (1 − b + b |d| / mean |d|))

with k₁ = 1.2 and b = 0.75. Words are runs of letters and digits, in lower case. The words' frequencies are those among
all passages, also where only some of them are ranked.

Source: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond, 2009.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftkit.engine.indices._encoder import Encoder
from ftkit.errors import InputError

_HEAP_BYTES = 64 << 20


def build(texts: Sequence[str], folder: Path, encoder: Encoder | None) -> None:  # noqa: ARG001
    """Writes the index of the texts to the folder."""
    tantivy = _tantivy()
    schema = _schema(tantivy)
    index = tantivy.Index(schema, path=str(folder))
    # one thread: passages that score alike must not change places between two builds
    writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
    for number, text in enumerate(texts):
        writer.add_document(tantivy.Document.from_dict({"number": number, "text": text}, schema))
    writer.commit()
    writer.wait_merging_threads()


def load(folder: Path, encoder: Encoder | None) -> "Bm25":  # noqa: ARG001
    """Opens an index."""
    return Bm25(folder)


class Bm25:
    """An `Index` in a folder."""

    def __init__(self, folder: Path) -> None:
        self._tantivy = _tantivy()
        self._schema = _schema(self._tantivy)
        self._index = self._tantivy.Index.open(str(folder))
        self._searcher = self._index.searcher()
        filters = self._tantivy.Filter
        words = self._tantivy.TextAnalyzerBuilder(self._tantivy.Tokenizer.simple())
        self._words = words.filter(filters.remove_long(40)).filter(filters.lowercase()).build()

    def query(self, text: str) -> Any:
        """The words of a text; each counts as often as it is there."""
        terms = (
            self._tantivy.Query.term_query(self._schema, "text", word, "freq") for word in self._words.analyze(text)
        )
        return self._tantivy.Query.boolean_query([(self._tantivy.Occur.Should, term) for term in terms])

    def search(self, queries: Sequence[Any], count: int) -> list[list[int]]:
        """As `Index.search`."""
        return [self._best(query, count) for query in queries]

    def rank(self, query: Any, passages: Sequence[int]) -> list[int]:
        """As `Index.rank`."""
        if not passages:
            return []
        queries, must = self._tantivy.Query, self._tantivy.Occur.Must
        chosen = queries.const_score_query(queries.term_set_query(self._schema, "number", list(passages)), 0.0)
        return self._best(queries.boolean_query([(must, query), (must, chosen)]), len(passages))

    def _best(self, query: Any, count: int) -> list[int]:
        # a few more, so that of passages that score alike the first ones are among them
        hits = self._searcher.search(query, count + 8, count=False).hits
        numbers = self._searcher.fast_field_values("number", [address for _, address in hits])
        ordered = sorted(zip((-score for score, _ in hits), map(int, numbers), strict=True))
        return [number for _, number in ordered[:count]]


def _schema(tantivy: Any) -> Any:
    fields = tantivy.SchemaBuilder()
    fields.add_unsigned_field("number", indexed=True, fast=True)
    fields.add_text_field("text", index_option="freq")
    return fields.build()


def _tantivy() -> Any:
    try:
        return importlib.import_module("tantivy")
    except ImportError:
        raise InputError(
            "bm25: expected the package tantivy, got nothing", "pip install 'ftkit[retrieval]', or retrieve by dense"
        ) from None
