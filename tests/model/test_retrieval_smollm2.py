"""Retrieval on the real model: guesses change no token, right or wrong, greedy or drawn."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ftkit.engine import GREEDY, Sampling, launch
from ftkit.engine.decode.retrieval import Retrieving
from ftkit.engine.indices import Index, open_index, read
from ftkit.recipes import quickstart

pytestmark = pytest.mark.model

ISLAND = Path(quickstart.__file__).parent / "quickstart_data" / "train.jsonl"


class Counted:
    """An index that counts, and remembers what was best."""

    def __init__(self, index: Index) -> None:
        self._index, self.searches = index, 0
        self.best: set[int] = set()
        self.query, self.rank = index.query, index.rank

    def search(self, queries: Sequence[Any], count: int) -> list[list[int]]:
        self.searches += 1
        found = self._index.search(queries, count)
        self.best |= {ids[0] for ids in found if ids}
        return found


def test_guesses_change_no_token(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("tantivy")
    conversations = [json.loads(line)["messages"] for line in ISLAND.read_text(encoding="utf-8").splitlines()]
    rows = [{"text": "\n".join(message["content"] for message in talk)} for talk in conversations]
    (tmp_path / "island.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    collection = read(tmp_path)
    talk = [{"role": "user", "content": "Tell me about Quillmere."}]
    with launch(smollm2, pool_bytes=256 << 20) as engine:
        index = open_index(collection)
        for how in (GREEDY, Sampling(temperature=0.8, seed=11)):
            how = dataclasses.replace(how, max_tokens=24, ignore_end=True)
            first = Counted(index)
            expected = Retrieving(engine, collection, first, every=4, speculate=False).generate(talk, how)
            assert first.searches == 6
            assert len(first.best) > 1
            for stride in (3, None):
                second = Counted(index)
                found = Retrieving(engine, collection, second, every=4, stride=stride).generate(talk, how)
                assert dataclasses.replace(found, cached_tokens=0) == dataclasses.replace(expected, cached_tokens=0)
                assert second.searches < first.searches or stride is None
