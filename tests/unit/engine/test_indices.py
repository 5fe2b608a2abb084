"""Indices find what their formulas say, rank a few passages as among all, and are made anew when files change."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.server.speakers import speaker

from ftkit import models
from ftkit.config.cache import cache_directory
from ftkit.engine.indices import Collection, Encoder, Index, open_index, read
from ftkit.engine.indices import dense as dense_room
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

WORDS = [f"w{number}" for number in range(30)]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Passages of 3 to 40 words: tantivy keeps lengths up to 40 exactly."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for number in range(150):
        text = " ".join(draw.choices(WORDS, range(30, 0, -1), k=draw.randint(3, 40)))
        (folder / f"{number:03}.txt").write_text(text)
    return read(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(models.load(speaker(tmp_path_factory.mktemp("model") / "tiny", "chatml")))


@pytest.fixture(scope="module", params=["bm25", "dense"])
def index(request: pytest.FixtureRequest, collection: Collection, encoder: Encoder) -> Index:
    if request.param == "bm25":
        pytest.importorskip("tantivy")
        return open_index(collection)
    return open_index(collection, "dense", encoder)


def queries(index: Index, count: int = 20) -> list[Any]:
    draw = random.Random(1)
    return [index.query(" ".join(draw.choices(WORDS, k=draw.randint(1, 12)))) for _ in range(count)]


def bm25(texts: Sequence[str], query: str) -> list[float]:
    """The formula, word by word."""
    documents = [Counter(text.split()) for text in texts]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = [0.0] * len(documents)
    for word in query.split():
        holders = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
        for number, document in enumerate(documents):
            bound = 1.2 * (0.25 + 0.75 * document.total() / mean)
            scores[number] += idf * document[word] * 2.2 / (document[word] + bound)
    return scores


def test_bm25_is_the_formula(collection: Collection) -> None:
    pytest.importorskip("tantivy")
    index = open_index(collection)
    texts = [passage.text for passage in collection.passages]
    for query in ("w0 w3 w29", "w7", "w1 w1 w2 w28 W5, w6!", "none w4"):
        scores = bm25(texts, query.lower().translate(str.maketrans("", "", ",!")))
        ((*found,),) = index.search([index.query(query)], 10)
        expected = sorted(range(len(texts)), key=lambda number: (-scores[number], number))[:10]
        assert [round(scores[number], 3) for number in found] == [round(scores[number], 3) for number in expected]
    assert index.search([index.query(""), index.query("?! unheard")], 5) == [[], []]


def test_dense_is_the_cosine(collection: Collection, encoder: Encoder) -> None:
    index = open_index(collection, "dense", encoder)
    vectors = torch.stack([encoder.one(passage.text) for passage in collection.passages]).double()
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors), dtype=torch.float64), atol=1e-6)
    for query in queries(index, 5):
        scores = vectors @ query.double()
        (found,) = index.search([query], 7)
        assert torch.allclose(scores[found], scores.sort(descending=True).values[:7], atol=1e-6)


def test_many_are_embedded_as_one(encoder: Encoder) -> None:
    texts = ["a", "", "bb " * 300, "c" * 9, "dd"]
    assert torch.allclose(encoder.many(texts), torch.stack([encoder.one(text) for text in texts]), atol=1e-5)


def test_a_few_are_ranked_as_among_all_and_a_query_alone_as_in_company(index: Index) -> None:
    asked = queries(index)
    together = index.search(asked, 12)
    for query, found in zip(asked, together, strict=True):
        assert index.search([query], 12) == [found]
        assert index.search([query], 5) == [found[:5]]
        some = random.Random(2).sample(found, len(found) // 2)
        assert index.rank(query, some) == [number for number in found if number in some]
    assert index.rank(asked[0], []) == []


def test_an_index_is_kept_and_made_anew_when_files_change(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    build = dense_room.build
    monkeypatch.setattr(dense_room, "build", lambda texts, *rest: (built.append(len(texts)), build(texts, *rest)))
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.md").write_text("one")
    room = cache_directory() / "retrieval"
    before = set(room.glob("*")) if room.is_dir() else set()
    for expected in ([1], [1]):
        open_index(read(folder), "dense", encoder)
        assert built == expected
    (folder / "b.md").write_text("two")
    changed = open_index(read(folder), "dense", encoder)
    assert built == [1, 2]
    assert sorted(changed.search([changed.query("x")], 3)[0]) == [0, 1]
    assert len(set(room.glob("*")) - before) == 1  # the one before is gone
    assert not list(room.glob(".*"))


def test_unknown_ways_are_said(collection: Collection) -> None:
    with pytest.raises(InputError, match="got 'bm52'"):
        open_index(collection, "bm52")
    with pytest.raises(InputError, match="expected a model that embeds"):
        open_index(collection, "dense")
