"""A server with --retriever: the answers of retrieval in the terminal, with their sources; and those without."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Http, Server, start, stop
from speakers import speaker

from ftkit import models
from ftkit.engine import Engine, Sampling
from ftkit.engine.decode.retrieval import Retrieving
from ftkit.engine.indices import encoder_of, open_index, read

pytestmark = pytest.mark.server

TALK = [{"role": "user", "content": "who keeps the lighthouse"}]
BODY: dict[str, Any] = {"messages": TALK, "max_tokens": 20, "ignore_eos": True, "seed": 3}
BIAS = {str(number): -100 for number in range(97, 264)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    speaker(folder / "tiny", "chatml")
    (folder / "notes").mkdir()
    draw = random.Random(0)
    for number in range(30):
        words = draw.choices(["bees", "who", "keeps", "lighthouse", *"abcdefghijklmnop"], k=20)
        (folder / "notes" / f"{number:02}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def http(home: Path) -> Iterator[Http]:
    where = ("--retriever", str(home / "notes"), "--retrieve-by", "dense", "--retrieve-every", "4")
    server = start(str(home / "tiny"), "--port=0", *where, f"--state-dir={home / 'state'}")
    yield Http(server.url, None)
    assert stop(server) == 0


@pytest.fixture(scope="module")
def retrieving(home: Path) -> Iterator[Retrieving]:
    engine = Engine(models.load(home / "tiny"))
    collection = read(home / "notes")
    with Retrieving(engine, collection, open_index(collection, "dense", encoder_of(engine)), every=4) as retrieving:
        yield retrieving


def ask(http: Http, **more: Any) -> Any:
    answer = http.post("/v1/chat/completions", BODY | more)
    return answer.status_code, answer.json()


def test_answers_are_those_of_the_terminal_and_name_their_sources(http: Http, retrieving: Retrieving) -> None:
    for how in (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 4},
        {"temperature": 1.0, "logit_bias": BIAS, "stop": ["\0", "a", "B"]},
    ):
        bias = {int(token): number for token, number in how.get("logit_bias", {}).items()}
        given = {"max_tokens": 20, "ignore_end": True, "seed": 3} | how
        given |= {"logit_bias": bias, "stop": tuple(how.get("stop", ()))}
        expected = retrieving.generate(TALK, Sampling(**given))
        status, document = ask(http, **how)
        assert status == 200, document
        (choice,) = document["choices"]
        assert choice["message"]["content"] == expected.text
        assert choice["finish_reason"] == expected.finish_reason
        assert document["usage"]["completion_tokens"] == expected.completion_tokens
        assert document["usage"]["prompt_tokens"] == expected.prompt_tokens
        sources = [{"source": passage.source, "text": passage.text} for passage in expected.sources]
        assert choice["sources"] == sources != []


def test_a_stream_ends_with_its_sources(http: Http) -> None:
    _, whole = ask(http)
    answer = http.post("/v1/chat/completions", BODY | {"stream": True})
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert [choice.get("sources") for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["sources"] == whole["choices"][0]["sources"]


def test_several_choices_each_have_their_own(http: Http) -> None:
    _, document = ask(http, n=3)
    texts = [choice["message"]["content"] for choice in document["choices"]]
    assert len(set(texts)) == 3
    assert all(choice["sources"] for choice in document["choices"])
    assert ask(http, seed=4)[1]["choices"][0]["message"]["content"] == texts[1]


def test_without_retrieval_where_it_is_not_wanted_or_cannot_be(http: Http, retrieving: Retrieving) -> None:
    plain = retrieving._engine.generate(TALK, Sampling(max_tokens=20, ignore_end=True, seed=3))
    status, document = ask(http, retrieval=False)
    assert (status, document["choices"][0]["message"]["content"]) == (200, plain.text)
    assert "sources" not in document["choices"][0]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}}
    status, document = ask(http, ignore_eos=False, response_format=schema)
    assert (status, document["choices"][0]["message"]["content"]) == (200, "1")
    status, document = ask(http, ignore_eos=False, response_format=schema, retrieval=True)
    assert (status, document["error"]["param"]) == (400, "retrieval")
    status, document = ask(http, presence_penalty=1)
    assert status == 400
    assert document["error"]["message"].startswith("presence_penalty: expected 0 with retrieval")


def test_a_server_without_a_retriever_says_so(managed: Any) -> None:
    server: Server = managed.server
    answer = Http(server.url).post("/v1/chat/completions", BODY | {"retrieval": True})
    assert answer.status_code == 400
    assert "started without --retriever" in answer.text
