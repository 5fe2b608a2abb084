"""Tools by the official client: calls in each family's form, whole and streamed, held to their schemas or only read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import start, stop
from speakers import MARKER, speaker

pytestmark = pytest.mark.server

MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather in Ulm?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of some days.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Ulm", 'a "}" é']},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
HERMES, LLAMA, MISTRAL = "qwen2_5", "llama3_1", "mistral_v3"
HOW: dict[str, Any] = {"model": "speaker", "messages": MESSAGES, "tools": [WEATHER, NOW], "max_tokens": 700}


@pytest.fixture(scope="module", params=[HERMES, LLAMA, MISTRAL])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def speaking(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    server = start(str(speaker(tmp_path_factory.mktemp(family) / "speaker", family)), "--port=0")
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)
    assert stop(server) == 0


def check(call: Any) -> None:
    arguments = json.loads(call.function.arguments)
    assert (len(call.id), call.id.isalnum(), call.type) == (9, True, "function")
    if call.function.name == "weather":
        assert arguments["place"] in ("Ulm", 'a "}" é')
        assert all(0 <= day <= 9 for day in arguments["days"])
        assert set(arguments) == {"place", "days"}
    else:
        assert call.function.name == "now"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_an_answer_that_must_call_calls_by_the_schema(speaking: openai.OpenAI, choice: Any) -> None:
    for seed in range(3):
        whole = speaking.chat.completions.create(**HOW, tool_choice=choice, seed=seed, parallel_tool_calls=False)
        (answer,) = whole.choices
        assert answer.message.content is None
        assert answer.message.tool_calls
        if answer.finish_reason == "length":  # random weights may well not come to an end of `now`'s free arguments
            assert answer.message.tool_calls[0].type == "function"
            assert answer.message.tool_calls[0].function.name == "now"
            continue
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls
        check(call)
        if choice != "required":
            assert call.type == "function"
            assert call.function.name == "weather"


def test_a_stream_gives_the_same_calls(speaking: openai.OpenAI) -> None:
    how = {**HOW, "tools": [WEATHER], "tool_choice": "required", "seed": 5}
    whole = speaking.chat.completions.create(**how).choices[0]
    calls: dict[int, list[str]] = {}
    reason, pieces = None, 0
    for chunk in speaking.chat.completions.create(**how, stream=True):
        (choice,) = chunk.choices
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or []:
            assert delta.function is not None
            if delta.index in calls:
                assert (delta.id, delta.type, delta.function.name) == (None, None, None)
                calls[delta.index][1] += delta.function.arguments or ""
                pieces += 1
            else:  # the name comes first, and whole
                assert delta.id
                assert (delta.type, delta.function.arguments, delta.index) == ("function", "", len(calls))
                calls[delta.index] = [delta.function.name or "", ""]
    assert whole.message.tool_calls
    functions = [call.function for call in whole.message.tool_calls if call.type == "function"]
    assert list(calls.values()) == [[function.name, function.arguments] for function in functions]
    assert pieces > 5 * len(calls)
    assert reason == whole.finish_reason


def test_the_clients_own_gathering_agrees(speaking: openai.OpenAI) -> None:
    how = {**HOW, "tools": [WEATHER], "tool_choice": "required", "seed": 8, "parallel_tool_calls": False}
    with speaking.chat.completions.stream(**how) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls
    check(final.message.tool_calls[0])
    assert final.finish_reason == "tool_calls"


ARGUMENTS = '{"place": "Ulm", "days": [1, {"a": "]}"}]}'


def said(family: str) -> tuple[str, str]:
    """What a model of the family may say by itself: some text, and two calls; as text and as a grammar."""
    first, second = f'"weather", "arguments": {ARGUMENTS}', '"now", "arguments": {}'
    if family == HERMES:
        text = "".join(f'\n<tool_call>\n{{"name": {call}}}\n</tool_call>' for call in (first, second))
        return "Let me see.", "start: " + json.dumps("Let me see." + text)
    if family == LLAMA:
        text = "; ".join(f'{{"name": {call}}}'.replace("arguments", "parameters") for call in (first, second))
        return "", "start: " + json.dumps(text)
    text = ", ".join(f'{{"name": {call}, "id": "abcdefghi"}}' for call in (first, second))
    return "Let me see.", f'start: "Let me see. " <[{MARKER}]> {json.dumps(f" [{text}]")}'


def test_calls_are_read_from_what_the_model_says_by_itself(family: str, speaking: openai.OpenAI) -> None:
    text, grammar = said(family)
    spoken = {"response_format": {"type": "grammar", "grammar": grammar}}
    answer = speaking.chat.completions.create(**HOW, extra_body=spoken, logprobs=True).choices[0]
    assert answer.message.content == (text or None)
    found = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or []]
    assert found == [("weather", ARGUMENTS), ("now", "{}")]
    assert answer.finish_reason == "tool_calls"
    assert answer.logprobs is not None
    one = speaking.chat.completions.create(**HOW, extra_body=spoken, parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls or []) == 1
    # the same words are text where no tools are
    bare = {**HOW, "tools": [], "tool_choice": "none"}
    plain = speaking.chat.completions.create(**bare, extra_body=spoken).choices[0]
    assert (plain.message.tool_calls, plain.finish_reason) == (None, "stop")
    assert '"weather"' in (plain.message.content or "")


def test_what_only_looks_like_a_call_reaches_the_user(speaking: openai.OpenAI) -> None:
    for text in ['{"name": "nobody", "parameters": {}}', "<tool_call>\nweather", "a <tool_", "[TOOL_CALLS]"]:
        spoken = {"response_format": {"type": "grammar", "grammar": "start: " + json.dumps(text)}}
        answer = speaking.chat.completions.create(**HOW, extra_body=spoken).choices[0]
        assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == (text, None, "stop")
        chunks = speaking.chat.completions.create(**HOW, extra_body=spoken, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_a_conversation_goes_on_with_what_the_tool_returned(speaking: openai.OpenAI) -> None:
    how = {**HOW, "tools": [WEATHER], "tool_choice": "required", "seed": 3, "parallel_tool_calls": False}
    first = speaking.chat.completions.create(**how).choices[0].message
    assert first.tool_calls
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"}
    messages = [*MESSAGES, first.model_dump(), result]
    before = speaking.chat.completions.create(**{**how, "messages": messages[:1]})
    after = speaking.chat.completions.create(**{**how, "messages": messages, "tool_choice": "auto", "max_tokens": 4})
    assert before.usage is not None
    assert after.usage is not None
    # a token is a byte: the call and its result are in the prompt
    assert after.usage.prompt_tokens > before.usage.prompt_tokens + len(first.tool_calls[0].function.arguments)


def test_a_form_or_a_call(speaking: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "t", "schema": schema}}
    for seed in range(4):
        how = {**HOW, "tools": [WEATHER], "response_format": form, "seed": seed, "parallel_tool_calls": False}
        message = speaking.chat.completions.create(**how).choices[0].message
        if message.tool_calls:
            check(message.tool_calls[0])
        else:
            assert json.loads(message.content or "")["x"] in (1, 2)


def test_n_choices_call_each_for_itself(speaking: openai.OpenAI) -> None:
    how = {**HOW, "tools": [WEATHER], "tool_choice": "required", "n": 3, "seed": 1, "parallel_tool_calls": False}
    whole = speaking.chat.completions.create(**how)
    ids = {call.id for choice in whole.choices for call in choice.message.tool_calls or []}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": 'a"b'}}]}, "tools[0].function.name"),
        ({"tools": [NOW, NOW]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, None),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}]}, None),
        ({"messages": [*MESSAGES, {"role": "assistant", "tool_calls": "x"}]}, None),
        ({"tool_choice": "required", "extra_body": {"ignore_eos": True}}, "ignore_eos"),
    ],
)
def test_errors(speaking: openai.OpenAI, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        speaking.chat.completions.create(**{**HOW, **fields})
    body: Any = caught.value.body
    assert "expected" in body["message"]
    assert param is None or body["param"] == param


def test_a_schema_that_nothing_follows_is_an_error_of_the_tools(speaking: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "nonsense"}}, "required": ["x"]}
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    with pytest.raises(openai.BadRequestError, match="tools: expected"):
        speaking.chat.completions.create(**{**HOW, "tools": tools, "tool_choice": "required"})


def test_a_model_whose_template_knows_no_tools_refuses_them(tmp_path: Path) -> None:
    server = start(str(speaker(tmp_path / "speaker", "chatml")), "--port=0")
    plain = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)
    with pytest.raises(openai.BadRequestError, match="template"):
        plain.chat.completions.create(**HOW)
    plain.chat.completions.create(**{**HOW, "tool_choice": "none", "max_tokens": 2})
    assert stop(server) == 0
