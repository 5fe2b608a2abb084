"""`/v1/responses` by the official client: answers, calls, the official events in their order, and what is not kept."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from serving import start, stop
from speakers import speaker

pytestmark = pytest.mark.server

PLACE: Any = {"enum": ["Ulm", "Bonn"]}
PARAMETERS: Any = {
    "type": "object",
    "properties": {"place": PLACE},
    "required": ["place"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "description": "d", "parameters": PARAMETERS, "strict": True}
HOW: dict[str, Any] = {"model": "speaker", "input": "How is the weather?"}
CALL: dict[str, Any] = {**HOW, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    server = start(str(speaker(tmp_path_factory.mktemp("responses") / "speaker", "qwen2_5")), "--port=0")
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)
    assert stop(server) == 0


def form(pattern: Any) -> dict[str, Any]:
    """Fields that hold the answer to a schema."""
    return {"text": {"format": {"type": "json_schema", "name": "t", "schema": pattern, "strict": True}}}


def test_an_answer_is_that_of_a_chat(speaking: openai.OpenAI) -> None:
    how: dict[str, Any] = {"temperature": 0, "model": "speaker"}
    response = speaking.responses.create(input="Hi", instructions="Be terse.", max_output_tokens=9, **how)
    messages: list[Any] = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]
    chat = speaking.chat.completions.create(messages=messages, max_tokens=9, **how)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.object, response.instructions) == ("incomplete", "response", "Be terse.")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert (response.usage.output_tokens, response.usage.input_tokens_details.cached_tokens) == (9, 0)
    items = [{"role": "developer", "content": [{"type": "input_text", "text": "Be terse."}]}, messages[1]]
    again = speaking.responses.create(input=items, max_output_tokens=9, **how)
    assert again.output_text == response.output_text


def test_a_schema_is_followed(speaking: openai.OpenAI) -> None:
    class Where(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        place: bool

    parsed = speaking.responses.parse(**HOW, text_format=Where)
    assert isinstance(parsed.output_parsed, Where)
    assert parsed.status == "completed"


def test_a_call_and_what_it_returned(speaking: openai.OpenAI) -> None:
    response = speaking.responses.create(**CALL)
    (call,) = response.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert json.loads(call.arguments)["place"] in PLACE["enum"]
    assert (call.status, response.status) == ("completed", "completed")
    items: list[Any] = [{"role": "user", "content": HOW["input"]}, call.model_dump()]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    after = speaking.responses.create(model="speaker", input=items, tools=[WEATHER], max_output_tokens=3)
    assert after.usage is not None
    assert response.usage is not None
    assert after.usage.input_tokens > response.usage.input_tokens + len(call.arguments) + len("sunny")
    assert after.tools[0].type == "function"


def test_events_of_a_text_come_in_the_official_order(speaking: openai.OpenAI) -> None:
    events = list(speaking.responses.create(**HOW, **form({"enum": ["some words", "other words"]}), stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas > 3
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == text
    assert json.loads(text) in ("some words", "other words")


def test_events_of_a_call(speaking: openai.OpenAI) -> None:
    events = list(speaking.responses.create(**CALL, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.function_call_arguments.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * deltas,
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    done = events[-2]
    assert done.type == "response.output_item.done"
    assert done.item.type == "function_call"
    assert done.item.arguments == arguments
    assert json.loads(arguments)["place"] in PLACE["enum"]


def test_the_clients_own_gathering_agrees(speaking: openai.OpenAI) -> None:
    with speaking.responses.stream(**CALL) as stream:
        final = stream.get_final_response()
    (call,) = final.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["place"] in PLACE["enum"]
    with speaking.responses.stream(**HOW, max_output_tokens=5, temperature=0) as stream:
        kinds = [event.type for event in stream]
    assert kinds[-1] == "response.incomplete"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "image"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "messages[0].content"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments"),
        ({"input": 3}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "yaml"}}}, "response_format.type"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"max_output_tokens": 0}, "max_tokens"),
    ],
)
def test_errors(speaking: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        speaking.responses.create(**{**HOW, **fields})
    body: Any = caught.value.body
    assert body["param"] == param
    assert "expected" in body["message"]
