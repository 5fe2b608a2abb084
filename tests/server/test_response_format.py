"""Answers in a form that was asked for: whatever the model says, what ends is valid."""

import json
import re
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
from serving import BASE

pytestmark = pytest.mark.server

MESSAGES: list[Any] = [{"role": "user", "content": "Describe the town of Paris as JSON with its name and size."}]


class Town(pydantic.BaseModel):
    """What is asked for."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=20)
    size: Literal["small", "large"]
    districts: list[Annotated[int, pydantic.Field(ge=1, le=20)]] = pydantic.Field(max_length=3)


@pytest.mark.parametrize("temperature", [0, 1.4])
def test_a_schema_holds_for_every_choice_and_adapter(client: openai.OpenAI, temperature: float) -> None:
    for model in (BASE, "two"):
        parsed = client.chat.completions.parse(
            model=model, messages=MESSAGES, response_format=Town, n=3, seed=3, temperature=temperature, max_tokens=250
        )
        assert len(parsed.choices) == 3
        for choice in parsed.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Town)


def test_streamed_is_the_same(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {
        "model": BASE,
        "messages": MESSAGES,
        "max_tokens": 250,
        "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": Town.model_json_schema()}},
    }
    whole = client.chat.completions.create(**how).choices[0].message.content
    chunks = client.chat.completions.create(stream=True, **how)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    Town.model_validate_json(whole or "")


def test_any_object(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=BASE, messages=MESSAGES, temperature=0, max_tokens=200, response_format={"type": "json_object"}
    ).choices[0]
    assert (whole.message.content or "").lstrip().startswith("{")
    if whole.finish_reason == "stop":
        assert isinstance(json.loads(whole.message.content or ""), dict)


def test_expressions_and_grammars_on_both_routes(client: openai.OpenAI) -> None:
    pattern = r"(yes|no), [0-9]{2}%"
    chosen: Any = {"response_format": {"type": "regex", "regex": pattern}}
    chat = client.chat.completions.create(model=BASE, messages=MESSAGES, extra_body=chosen).choices[0]
    raw = client.completions.create(model=BASE, prompt="Is it?", extra_body=chosen, max_tokens=30).choices[0]
    for text in (chat.message.content, raw.text):
        assert re.fullmatch(pattern, text or "")
    grammar: Any = {"response_format": {"type": "grammar", "grammar": 'start: "<" (start | "e")+ ">"'}}
    nested = client.completions.create(model=BASE, prompt="<", extra_body=grammar, max_tokens=60).choices[0]
    assert re.fullmatch("[<e>]+", nested.text)


@pytest.mark.parametrize(
    ("response_format", "part"),
    [
        ({"type": "yaml"}, "response_format.type: expected text, json_object, json_schema, regex or grammar"),
        ({"type": "json_schema"}, "response_format.json_schema: expected an object"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}, "Invalid type: nonsense"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "http://example.org/"}}}, "expected a JSON schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "other": 1}}, "other"),
        ({"type": "regex", "regex": "("}, "expected a regular expression"),
        ({"type": "grammar", "grammar": "start: missing"}, 'unknown name: "missing"'),
        ({"type": "grammar", "grammar": "start: start"}, "no answer satisfies"),
    ],
)
def test_what_cannot_be_followed(client: openai.OpenAI, response_format: Any, part: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=BASE, messages=MESSAGES, extra_body={"response_format": response_format})
    assert part in str(caught.value)


def test_with_ignore_eos(client: openai.OpenAI) -> None:
    body: Any = {"response_format": {"type": "json_object"}, "ignore_eos": True}
    with pytest.raises(openai.BadRequestError, match="ignore_eos"):
        client.chat.completions.create(model=BASE, messages=MESSAGES, extra_body=body)
