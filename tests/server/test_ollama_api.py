"""`/api/…` as Ollama documents it: lines of JSON, tools, options, and its errors."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx2 as httpx
import pytest
from serving import start, stop
from speakers import speaker

pytestmark = pytest.mark.server

MESSAGES = [{"role": "user", "content": "How is the weather?"}]
OPTIONS = {"temperature": 0, "num_predict": 9, "num_ctx": 2048, "seed": 3, "stop": ["\x00"]}
PARAMETERS = {
    "type": "object",
    "properties": {"place": {"enum": ["Ulm", "Bonn"]}},
    "required": ["place"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    server = start(str(speaker(tmp_path_factory.mktemp("ollama") / "speaker", "qwen2_5")), "--port=0")
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
    assert stop(server) == 0


def ask(http: httpx.Client, path: str, body: Any) -> Any:
    answer = http.post(path, json={"model": "speaker:latest", "stream": False, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def lines(http: httpx.Client, path: str, body: Any) -> list[Any]:
    answer = http.post(path, json={"model": "speaker", **body})
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_chat_is_that_of_openai(http: httpx.Client) -> None:
    whole = ask(http, "/api/chat", {"messages": MESSAGES, "options": OPTIONS})
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 9, "stop": ["\x00"]}
    other = http.post("/v1/chat/completions", json=body).json()
    assert whole["message"] == {"role": "assistant", "content": other["choices"][0]["message"]["content"]}
    assert (whole["done"], whole["done_reason"], whole["model"]) == (True, "length", "speaker")
    assert whole["prompt_eval_count"] == other["usage"]["prompt_tokens"]
    assert whole["eval_count"] == 9
    times = [whole[f"{name}_duration"] for name in ("total", "load", "prompt_eval", "eval")]
    assert times[0] == sum(times[1:])
    datetime.fromisoformat(whole["created_at"])


def test_a_chat_streams_unless_told_otherwise(http: httpx.Client) -> None:
    found = lines(http, "/api/chat", {"messages": MESSAGES, "options": OPTIONS})
    whole = ask(http, "/api/chat", {"messages": MESSAGES, "options": OPTIONS})
    assert "".join(line["message"]["content"] for line in found) == whole["message"]["content"]
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    assert found[-1]["eval_count"] == 9


def test_generate_asks_or_goes_on_with_a_text(http: httpx.Client) -> None:
    asked = {"prompt": MESSAGES[0]["content"], "system": "Be terse.", "options": OPTIONS}
    messages = [{"role": "system", "content": "Be terse."}, *MESSAGES]
    chat = ask(http, "/api/chat", {"messages": messages, "options": OPTIONS})
    whole = ask(http, "/api/generate", asked)
    assert (whole["response"], whole["prompt_eval_count"]) == (chat["message"]["content"], chat["prompt_eval_count"])
    assert "".join(line["response"] for line in lines(http, "/api/generate", asked)) == whole["response"]
    raw = ask(http, "/api/generate", {"prompt": "Once", "raw": True, "options": {**OPTIONS, "num_predict": 20}})
    text = http.post("/v1/completions", json={"prompt": "Once", "temperature": 0, "max_tokens": 20}).json()
    assert raw["response"] == text["choices"][0]["text"]
    assert (raw["prompt_eval_count"], raw["eval_count"]) == (len("Once"), text["usage"]["completion_tokens"])


def test_a_form(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [1]}}, "required": ["x"], "additionalProperties": False}
    whole = ask(http, "/api/chat", {"messages": MESSAGES, "format": schema})
    assert json.loads(whole["message"]["content"]) == {"x": 1}
    assert whole["done_reason"] == "stop"
    begun = ask(http, "/api/generate", {"prompt": "x", "format": "json", "options": {"num_predict": 1}})
    assert begun["response"] == "{"


def test_a_call_comes_whole_and_its_result_goes_back(http: httpx.Client) -> None:
    # A tool may be called or a text of the schema given: a schema that no text of the model is likely to end in time.
    schema = {"type": "object", "properties": {"x": {"const": "y" * 300}}, "required": ["x"]}
    body = {"messages": MESSAGES, "tools": [TOOL], "format": schema}
    for seed in range(20):
        found = lines(http, "/api/chat", {**body, "options": {"seed": seed, "num_predict": 700, "temperature": 1.5}})
        calls = [call for line in found for call in line["message"].get("tool_calls", [])]
        if calls:
            break
    assert calls
    assert all(call["function"]["name"] == "weather" for call in calls)
    assert all(call["function"]["arguments"]["place"] in ("Ulm", "Bonn") for call in calls)
    call = {"role": "assistant", "content": "", "tool_calls": calls[:1]}
    turns = [*MESSAGES, call, {"role": "tool", "content": "sunny", "tool_name": "weather"}]
    before = ask(http, "/api/chat", {"messages": MESSAGES, "tools": [TOOL], "options": OPTIONS})
    after = ask(http, "/api/chat", {"messages": turns, "tools": [TOOL], "options": OPTIONS})
    assert after["prompt_eval_count"] > before["prompt_eval_count"] + len("weather place Ulm sunny")


def test_what_clients_ask_first(http: httpx.Client) -> None:
    (model,) = http.get("/api/tags").json()["models"]
    assert (model["name"], model["model"]) == ("speaker", "speaker")
    datetime.fromisoformat(model["modified_at"])
    shown = http.post("/api/show", json={"model": "speaker"}).json()
    assert shown["capabilities"] == ["completion", "tools"]
    assert "<tool_call>" in shown["template"]
    assert shown["model_info"]["ftkit.context_length"] == 4096
    assert http.get("/api/version").json()["version"]


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("/api/chat", {"messages": "x"}, 400, "messages: expected"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["x"]}]}, 400, "images"),
        ("/api/chat", {"messages": MESSAGES, "format": "yaml"}, 400, "format: expected"),
        ("/api/chat", {"messages": MESSAGES, "options": {"mirostat": 1}}, 400, "mirostat"),
        ("/api/chat", {"messages": MESSAGES, "model": "nobody"}, 404, "nobody"),
        ("/api/generate", {}, 400, "prompt: expected"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "suffix: expected none"),
        ("/api/generate", {"prompt": "x", "context": [1]}, 400, "context: expected none"),
        ("/api/show", {"model": "nobody"}, 404, "nobody"),
        ("/api/pull", {"model": "x"}, 404, "/api/pull"),
    ],
)
def test_errors(http: httpx.Client, path: str, body: Any, status: int, part: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == status
    document = answer.json()
    assert set(document) == {"error"}
    assert part in document["error"]
