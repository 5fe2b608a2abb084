"""A server with --retriever: the answers of retrieval in the terminal, with their sources; and those without."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from browsing import chromium, visit
from playwright.sync_api import expect
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
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 1.0, "repetition_penalty": 1.1},
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


TEN: dict[str, Any] = {"temperature": 0, "max_tokens": 10}


@pytest.fixture(scope="module")
def told(http: Http) -> tuple[str, list[tuple[str, str]]]:
    """What the other APIs are held to: an answer and its sources in a chat's words."""
    (choice,) = http.post("/v1/chat/completions", {"messages": TALK} | TEN).json()["choices"]
    assert choice["sources"]
    return choice["message"]["content"], [(one["source"], one["text"]) for one in choice["sources"]]


def test_anthropic_s_client_finds_citations(http: Http, told: tuple[str, list[tuple[str, str]]]) -> None:
    client = anthropic.Anthropic(base_url=http.url, api_key="-", max_retries=0)
    asked: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_tokens": 10, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        cited = [event.citation for event in stream if event.type == "citation"]
        last = stream.get_final_message()
    for message in (whole, last):
        (block,) = message.content
        assert block.type == "text"
        assert block.citations is not None
        found = [(one.source, one.cited_text) for one in block.citations if one.type == "search_result_location"]
        assert (block.text, found) == told
    assert [(one.source, one.cited_text) for one in cited if one.type == "search_result_location"] == told[1]
    # what was said comes back as it is, with its citations
    again: Any = [*TALK, {"role": "assistant", "content": [part.model_dump() for part in whole.content]}, *TALK]
    assert client.messages.create(**asked | {"messages": again}).content
    (block,) = client.messages.create(**asked | {"extra_body": {"temperature": 0, "retrieval": False}}).content
    assert block.type == "text"
    assert block.citations is None


def test_responses_have_annotations(http: Http, told: tuple[str, list[tuple[str, str]]]) -> None:
    client = openai.OpenAI(base_url=f"{http.url}/v1", api_key="-", max_retries=0)
    asked: dict[str, Any] = {"model": "tiny", "input": TALK, "max_output_tokens": 10, "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    last = next(event.response for event in events if event.type == "response.incomplete")
    for response in (whole, last):
        (item,) = response.output
        assert item.type == "message"
        (part,) = item.content
        assert part.type == "output_text"
        cited = [(one.filename, one.text) for one in part.annotations if one.type == "file_citation"]
        assert (part.text, cited) == told
        assert {one.index for one in part.annotations} == {len(part.text)}
    added = [event.annotation for event in events if event.type == "response.output_text.annotation.added"]
    assert [(one["filename"], one["text"]) for one in map(dict, added)] == told[1]
    again: Any = [*TALK, *(item.model_dump() for item in whole.output), *TALK]
    assert client.responses.create(**asked | {"input": again}).output
    (item,) = client.responses.create(**asked, extra_body={"retrieval": False}).output
    assert item.content[0].annotations == []


def test_ollama_s_last_word_has_them(http: Http, told: tuple[str, list[tuple[str, str]]]) -> None:
    asked = {"model": "tiny", "messages": TALK, "options": {"temperature": 0, "num_predict": 10}}
    lines = [json.loads(line) for line in http.post("/api/chat", asked).text.splitlines()]
    whole = http.post("/api/chat", asked | {"stream": False}).json()
    single = {"model": "tiny", "prompt": TALK[0]["content"], "options": asked["options"], "stream": False}
    generated = http.post("/api/generate", single).json()
    for text, last in [
        ("".join(line["message"]["content"] for line in lines), lines[-1]),
        (whole["message"]["content"], whole),
        (generated["response"], generated),
    ]:
        assert (text, [(one["source"], one["text"]) for one in last["sources"]]) == told
    assert not any("sources" in line for line in lines[:-1])
    assert "sources" not in http.post("/api/chat", asked | {"stream": False, "retrieval": False}).json()
    assert http.post("/api/generate", single | {"raw": True, "retrieval": False}).status_code == 200
    assert http.post("/api/generate", single | {"raw": True, "retrieval": True}).status_code == 400
    said = ollama.Client(http.url).chat("tiny", TALK, options={"temperature": 0, "num_predict": 10})
    assert said.message.content == told[0]


def test_the_page_has_them_under_an_answer(http: Http) -> None:
    with chromium() as browser, visit(browser, http.url, key=None) as here:
        expect(here.page.locator("#model option")).not_to_have_count(0)
        here.page.get_by_role("button", name="Settings").click()
        for field, value in (("Temperature", "0"), ("Most tokens", "10")):
            here.page.get_by_label(field).fill(value)
        here.ask(TALK[0]["content"])
        sources = ask(http, temperature=0, max_tokens=10, ignore_eos=False)[1]["choices"][0]["sources"]
        shown = here.page.locator(".assistant .sources")
        expect(shown.locator("blockquote").first).not_to_be_visible()
        shown.locator("summary").click()
        expect(shown.locator("blockquote").first).to_be_visible()
        assert shown.locator("blockquote").all_inner_texts() == [one["text"] for one in sources]
        assert shown.locator("p").all_inner_texts() == [one["source"] for one in sources]


def test_a_server_without_a_retriever_says_so(managed: Any) -> None:
    server: Server = managed.server
    answer = Http(server.url).post("/v1/chat/completions", BODY | {"retrieval": True})
    assert answer.status_code == 400
    assert "started without --retriever" in answer.text
