"""An engine with retrieval on a tiny model: with and without guesses, greedy and drawn, the same answers."""

import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.server.speakers import speaker
from typer.testing import CliRunner

from ftkit import cli, models
from ftkit.engine import GREEDY, Engine, Sampling
from ftkit.engine.decode.retrieval import Retrieving, SourcedCompletion
from ftkit.engine.indices import Collection, Index, encoder_of, open_index, read
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "bees"},
    {"role": "assistant", "content": "?"},
    {"role": "user", "content": "who keeps the lighthouse"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaker(tmp_path_factory.mktemp("model") / "tiny", "chatml")


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Engine]:
    with Engine(models.load(base), pool_bytes=8 << 20) as engine:
        yield engine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notes")
    draw = random.Random(0)
    for number in range(40):
        words = draw.choices(["bees", "who", "keeps", "lighthouse", "the", *"abcdefghijklmnop"], k=20)
        (folder / f"{number:02}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def collection(place: Path) -> Collection:
    return read(place)


@pytest.fixture(scope="module", params=["bm25", "dense"])
def index(request: pytest.FixtureRequest, collection: Collection, engine: Engine) -> Index:
    if request.param == "bm25":
        pytest.importorskip("tantivy")
        return open_index(collection)
    return open_index(collection, "dense", encoder_of(engine))


class Slow:
    """An index that takes its time, so that guessing pays."""

    def __init__(self, index: Index, seconds: float = 0.0) -> None:
        self._index, self._seconds, self.searches = index, seconds, 0
        self.query, self.rank = index.query, index.rank

    def search(self, queries: Sequence[Any], count: int) -> list[list[int]]:
        self.searches += 1
        time.sleep(self._seconds)
        return self._index.search(queries, count)


@pytest.mark.parametrize(
    ("how", "passages"),
    [
        (GREEDY, 1),
        (Sampling(seed=3, top_p=0.9), 2),
        (Sampling(seed=4, repetition_penalty=1.2, frequency_penalty=0.4), 1),
    ],
)
def test_guesses_change_no_token(
    engine: Engine, collection: Collection, index: Index, how: Sampling, passages: int
) -> None:
    how = dataclasses.replace(how, max_tokens=33, ignore_end=True, logprobs=1)
    sizes: dict[str, Any] = {"passages": passages, "every": 5}
    expected = Retrieving(engine, collection, index, speculate=False, **sizes).generate(TALK, how)
    assert len(expected.tokens) == expected.completion_tokens == 33
    assert expected.finish_reason == "length"
    assert len(expected.sources) >= passages
    for options in ({"stride": 1}, {"stride": 3}, {"stride": 2, "overlap": False}, {}):
        slow = Slow(index, 0.01)
        found = Retrieving(engine, collection, slow, **sizes, **options).generate(TALK, how)
        assert dataclasses.replace(found, cached_tokens=0) == dataclasses.replace(expected, cached_tokens=0), options
        assert slow.searches <= 7


def plainly(engine: Engine, collection: Collection, index: Index, prompt: Any, how: Sampling, **more: Any) -> Any:
    return Retrieving(engine, collection, index, every=5, **more).generate(prompt, how)


def test_what_one_retrieval_covers_is_the_engine_s_own_answer(
    engine: Engine, collection: Collection, index: Index
) -> None:
    how = Sampling(seed=5, max_tokens=5, ignore_end=True)
    answer = plainly(engine, collection, index, TALK, how)
    (passage,) = answer.sources
    under = f"Passages that may help:\n\n[1] {passage.text}\n\n{TALK[-1]['content']}"
    assert answer.tokens == engine.generate([*TALK[:-1], {"role": "user", "content": under}], how).tokens
    text = plainly(engine, collection, index, "who keeps", how)
    assert text.tokens == engine.generate(f"{text.sources[0].text}\n\nwho keeps", how).tokens


class Nothing:
    """An index that finds nothing: answers are the engine's own, in parts."""

    def query(self, text: str) -> None: ...

    def search(self, queries: Sequence[None], count: int) -> list[list[int]]:  # noqa: ARG002
        return [[] for _ in queries]

    def rank(self, query: None, passages: Sequence[int]) -> list[int]:  # noqa: ARG002
        return []


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_count_the_parts_before(engine: Engine, collection: Collection, penalty: str) -> None:
    how = dataclasses.replace(GREEDY, max_tokens=40, ignore_end=True)
    penalised = dataclasses.replace(how, **{penalty: 1.7})
    whole = engine.generate(TALK, penalised)
    assert whole.tokens != engine.generate(TALK, how).tokens
    # the last of the parts tells most: what was counted anew in each part would be the same again
    assert plainly(engine, collection, Nothing(), TALK, penalised).tokens == whole.tokens


def test_no_two_parts_of_an_answer_are_drawn_alike(engine: Engine, collection: Collection) -> None:
    uniform = Sampling(seed=5, max_tokens=40, temperature=100.0, ignore_end=True)
    answer = plainly(engine, collection, Nothing(), "abc", uniform)
    assert answer.sources == ()
    parts = {tuple(answer.tokens[start : start + 5]) for start in range(0, 40, 5)}
    assert len(parts) == 8


def streamed(retrieving: Retrieving, prompt: Any, how: Sampling) -> SourcedCompletion:
    text, tokens, last = "", [], None
    for last in retrieving.stream(prompt, how):
        text, tokens = text + last.text, [*tokens, *last.tokens]
    assert last is not None
    return SourcedCompletion(text, [token.id for token in tokens], last.finish_reason or "", 0, 0, 0)


def test_a_stop_string_over_two_parts_ends_the_answer_as_in_the_engine(
    engine: Engine, collection: Collection, index: Index
) -> None:
    how = Sampling(seed=1, max_tokens=40, ignore_end=True, logit_bias={number: -100 for number in range(97, 264)})
    retrieving = Retrieving(engine, collection, index, every=5)
    whole = retrieving.generate(TALK, how)
    assert len(whole.text) > 14
    # five tokens a part: these letters are of two parts
    stop = whole.text[3:7]
    for stops in ((stop,), ("\0nothing", stop, whole.text[4:8]), (whole.text[9:12] + "\0", stop)):
        cut = streamed(retrieving, TALK, dataclasses.replace(how, stop=stops))
        assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        assert engine.loaded.tokenizer.decode(cut.tokens) == cut.text
    held = streamed(retrieving, TALK, dataclasses.replace(how, stop=(whole.text[-3:] + "\0",)))
    assert (held.text, held.finish_reason) == (whole.text, "length")


def test_the_context_ends_an_answer(base: Path, collection: Collection) -> None:
    with Engine(models.load(base), context_tokens=480, pool_bytes=8 << 20) as engine:
        index = open_index(collection, "dense", encoder_of(engine))
        for speculate in (False, True):
            retrieving = Retrieving(engine, collection, index, every=64, speculate=speculate)
            answer = retrieving.generate(TALK, Sampling(seed=2, ignore_end=True))
            assert answer.finish_reason == "length"
            assert 64 < len(answer.tokens) < 480 - answer.prompt_tokens + 64
        with pytest.raises(InputError, match="fewer than 480 tokens"):
            retrieving.generate("x" * 500)


def test_what_cannot_be_asked_is_said(engine: Engine, collection: Collection, index: Index) -> None:
    retrieving = Retrieving(engine, collection, index)
    for prompt, how, reason in [
        ([1, 2], GREEDY, "got token ids"),
        ([{"role": "assistant", "content": "x"}], GREEDY, "one of the user's"),
        ([{"role": "user", "content": [{"type": "text"}]}], GREEDY, "a question that is a text"),
        ("x", Sampling(top_p=2.0), "top_p"),
    ]:
        with pytest.raises(InputError, match=reason):
            retrieving.generate(prompt, how)
    for wrong in ({"every": 0}, {"passages": 0}, {"stride": 0}):
        with pytest.raises(InputError, match="expected 1 or more, got 0"):
            Retrieving(engine, collection, index, **wrong)


def test_one_question_through_a_pipe_names_its_sources(base: Path, place: Path) -> None:
    def ask(*more: str) -> Any:
        arguments = ["chat", str(base), "--retriever", str(place), "--max-tokens", "20", "--seed", "1", *more]
        return CliRunner().invoke(cli.application(), arguments, input="who keeps bees")

    result = ask("--retrieve-by", "dense", "--retrieve-every", "4", "--json")
    assert result.exit_code == 0, result.output
    sources = json.loads(result.stdout)["sources"]
    assert sources
    assert all(source["text"] == (place / source["source"].removesuffix(":1")).read_text() for source in sources)
    assert "40 passages from" in result.stderr
    result = ask("--retrieve-by", f"dense={base}")
    assert f"sources: {sources[0]['source']}" in result.stderr
    for arguments, reason in [
        (("--retrieve-by", "bm25=x"), "bm25, dense or dense=MODEL"),
        (("--retrieve-by", "dance"), "got 'dance'"),
        (("--engine", "llama-cpp"), "expected a model that answers here"),
        (("--retriever", "/nowhere"), "got nothing there"),
    ]:
        result = ask(*arguments)
        assert isinstance(result.exception, InputError)
        assert reason in str(result.exception)
