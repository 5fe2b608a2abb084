"""`/v1/messages` as Anthropic documents it: messages, tools, events, counts, errors in its own shape."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from serving import KEY, start, stop
from speakers import speaker

pytestmark = pytest.mark.server

HOW: dict[str, Any] = {
    "model": "speaker",
    "max_tokens": 400,
    "messages": [{"role": "user", "content": "How is the weather?"}],
}
SCHEMA: Any = {
    "type": "object",
    "properties": {"place": {"enum": ["Ulm", "Bonn"]}},
    "required": ["place"],
    "additionalProperties": False,
}
CALL: dict[str, Any] = {
    **HOW,
    "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = speaker(tmp_path_factory.mktemp("anthropic") / "speaker", "qwen2_5")
    server = start(str(folder), "--port=0", f"--api-key={KEY}")
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
        yield client
    assert stop(server) == 0


def ask(http: httpx.Client, body: Any, path: str = "/v1/messages") -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(message: Any) -> int:
    """Tokens of the prompt, those that were there already included."""
    usage = message["usage"]
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"])


def events(http: httpx.Client, body: Any) -> list[Any]:
    with http.stream("POST", "/v1/messages", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def test_a_message_is_the_answer_of_a_chat(http: httpx.Client) -> None:
    body = {**HOW, "system": [{"type": "text", "text": "Be terse."}], "max_tokens": 7, "temperature": 0}
    message = ask(http, body)
    messages = [{"role": "system", "content": "Be terse."}, *HOW["messages"]]
    chat = {"model": "speaker", "messages": messages, "max_tokens": 7, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=chat, headers={"authorization": f"Bearer {KEY}"}).json()
    assert message["content"] == [{"type": "text", "text": answer["choices"][0]["message"]["content"]}]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "speaker")
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    assert tokens(message) == answer["usage"]["prompt_tokens"]
    assert message["usage"]["output_tokens"] == 7
    counted = ask(http, {key: body[key] for key in ("model", "system", "messages")}, "/v1/messages/count_tokens")
    assert counted == {"input_tokens": answer["usage"]["prompt_tokens"]}


def test_a_stop_sequence_is_named(http: httpx.Client) -> None:
    # every answer of a schema has a quote; the model says nothing sensible by itself
    message = ask(http, {**CALL, "stop_sequences": ["never", '"name"']})
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", '"name"')


def test_a_call_and_what_it_returned(http: httpx.Client) -> None:
    message = ask(http, CALL)
    (block,) = message["content"]
    assert (block["type"], block["name"], message["stop_reason"]) == ("tool_use", "weather", "tool_use")
    assert block["input"]["place"] in ("Ulm", "Bonn")
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "sunny"}]}
    turns = [
        *HOW["messages"],
        {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, block]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    body = {**CALL, "messages": turns, "tool_choice": {"type": "tool", "name": "weather"}}
    after = ask(http, body)
    assert after["stop_reason"] == "tool_use"
    assert tokens(after) > tokens(message) + len("Let me see. sunny And?")


def test_events_of_a_text(http: httpx.Client) -> None:
    body = {**HOW, "max_tokens": 12, "temperature": 0}
    found = events(http, body)
    kinds = [event["type"] for event in found]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    whole = ask(http, body)
    assert found[0]["message"]["usage"]["input_tokens"] == tokens(whole)
    assert found[0]["message"]["content"] == []
    text = "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")
    assert [{"type": "text", "text": text}] == whole["content"]
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 12
    # the second time all full pages but the last token are there
    assert whole["usage"]["cache_read_input_tokens"] == (tokens(whole) - 1) // 16 * 16 > 0


def test_events_of_a_call(http: httpx.Client) -> None:
    found = events(http, CALL)
    begin = found[1]
    assert (begin["type"], begin["index"]) == ("content_block_start", 0)
    assert (begin["content_block"]["type"], begin["content_block"]["input"]) == ("tool_use", {})
    parts = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert {part["type"] for part in parts} == {"input_json_delta"}
    assert json.loads("".join(part["partial_json"] for part in parts))["place"] in ("Ulm", "Bonn")
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0]"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "x"}}, "tool_choice"),
        ({"no_such_field": 1}, "expected fields of the API"),
    ],
)
def test_errors(http: httpx.Client, change: Any, part: str) -> None:
    answer = http.post("/v1/messages", json={**HOW, **change})
    assert answer.status_code == 400
    document = answer.json()
    assert set(document) == {"type", "error"}
    assert (document["type"], document["error"]["type"]) == ("error", "invalid_request_error")
    assert part in document["error"]["message"]


def test_errors_before_the_route_have_its_shape_too(http: httpx.Client) -> None:
    for headers, body, status, kind in [
        ({"x-api-key": "another"}, HOW, 401, "authentication_error"),
        ({"x-api-key": KEY}, {**HOW, "model": "nobody"}, 404, "not_found_error"),
        ({"x-api-key": KEY, "origin": "http://evil.example"}, HOW, 403, "permission_error"),
    ]:
        answer = http.post("/v1/messages", json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert http.get("/v1/messages").json()["type"] == "error"
    # this header opens no other API's routes
    assert http.get("/v1/models").status_code == 401
