"""Anthropic's official client: messages, streams, calls and errors, as its helpers put them together."""

import json
from typing import Any, Literal

import anthropic
import pydantic
import pytest
from serving import KEY, Server

pytestmark = pytest.mark.server

MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather?"}]
HOW: dict[str, Any] = {"model": "speaker", "max_tokens": 9, "messages": MESSAGES, "extra_body": {"temperature": 0}}
WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a place.",
    "input_schema": {
        "type": "object",
        "properties": {"place": {"enum": ["Ulm", "Bonn"]}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
CALL: dict[str, Any] = HOW | {"max_tokens": 400, "tools": [WEATHER], "tool_choice": {"type": "any"}}


@pytest.fixture(scope="module")
def claude(caller: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=caller.url, api_key=KEY, max_retries=0, timeout=60)


def test_a_stream_becomes_the_message(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(**HOW, system="Be terse.")
    assert (whole.type, whole.role, whole.model) == ("message", "assistant", "speaker")
    assert whole.stop_reason in ("max_tokens", "end_turn")
    (block,) = whole.content
    assert block.type == "text"
    assert 1 < whole.usage.output_tokens <= 9
    with claude.messages.stream(**HOW, system="Be terse.") as stream:
        assert "".join(stream.text_stream) == block.text
        last = stream.get_final_message()
    assert [part.text for part in last.content if part.type == "text"] == [block.text]
    assert (last.stop_reason, last.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    # what was computed for the first answer is there for the second
    asked = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0) == asked
    assert last.usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model="speaker", messages=MESSAGES, system="Be terse.")
    assert counted.input_tokens == asked


def test_a_call_and_its_result_go_round(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(**CALL)
    (call,) = [block for block in whole.content if block.type == "tool_use"]
    assert (whole.stop_reason, call.name) == ("tool_use", "weather")
    assert call.input in ({"place": "Ulm"}, {"place": "Bonn"})
    with claude.messages.stream(**CALL) as stream:
        events = list(stream)
        last = stream.get_final_message()
    assert [block.input for block in last.content if block.type == "tool_use"] == [call.input]
    pieces = [event.partial_json for event in events if event.type == "input_json"]
    assert json.loads("".join(pieces)) == call.input
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny", "is_error": False}
    turns: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    after = claude.messages.create(**(HOW | {"messages": turns, "tools": [WEATHER]}))
    assert after.usage.output_tokens > 1


def test_an_answer_is_of_the_type_asked_for(claude: anthropic.Anthropic) -> None:
    class Where(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        place: Literal["Ulm", "Bonn"]

    how: dict[str, Any] = HOW | {"max_tokens": 200}
    parsed = claude.messages.parse(**how, output_format=Where)
    assert isinstance(parsed.parsed_output, Where)
    form: Any = {"effort": "low", "format": {"type": "json_schema", "schema": Where.model_json_schema()}}
    (block,) = claude.messages.create(**how, output_config=form, thinking={"type": "adaptive"}).content
    assert block.type == "text"
    assert Where.model_validate_json(block.text)


def test_leaving_a_stream_frees_its_pages(claude: anthropic.Anthropic, caller: Server) -> None:
    with claude.messages.stream(**(HOW | {"max_tokens": 3000})) as stream:
        next(iter(stream.text_stream))
        assert caller.metric("blocks_used") > 0
    caller.until(lambda: caller.metric("blocks_used") == 0)


@pytest.mark.parametrize(
    ("fields", "error", "part"),
    [
        ({"model": "nobody"}, anthropic.NotFoundError, "nobody"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"output_config": {"format": {"type": "yaml"}}}, anthropic.BadRequestError, "output_config.format.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, anthropic.BadRequestError, "thinking"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, anthropic.BadRequestError, "prompt"),
        ({"extra_body": {"no_such_field": 1}}, anthropic.BadRequestError, "no_such_field"),
        ({"extra_headers": {"x-api-key": "another"}}, anthropic.AuthenticationError, "key"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    claude: anthropic.Anthropic, fields: dict[str, Any], error: type[anthropic.APIStatusError], part: str, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        claude.messages.create(**(HOW | fields), stream=stream)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert part in body["error"]["message"]
    assert caught.value.request_id == caught.value.response.headers["request-id"]
