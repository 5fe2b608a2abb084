"""Ollama's official client: chats, texts to go on with, calls, forms, models and errors."""

from typing import Any, Literal

import ollama
import pydantic
import pytest
from serving import KEY, Server

pytestmark = pytest.mark.server

MESSAGES = [{"role": "user", "content": "How is the weather?"}]
OPTIONS = {"temperature": 0, "num_predict": 9, "num_ctx": 2048}


class Where(pydantic.BaseModel):
    """What is asked for."""

    model_config = pydantic.ConfigDict(extra="forbid")

    place: Literal["Ulm", "Bonn"]


def weather(place: str) -> str:
    """The weather of a place.

    Args:
        place: Where.
    """
    return f"sunny in {place}"


@pytest.fixture(scope="module")
def llama(caller: Server) -> ollama.Client:
    return ollama.Client(caller.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)


def test_a_chat_streams_what_it_says_at_once(llama: ollama.Client) -> None:
    whole = llama.chat("speaker:latest", MESSAGES, options=OPTIONS)
    assert (whole.message.role, whole.done, whole.done_reason, whole.eval_count) == ("assistant", True, "length", 9)
    assert whole.message.content
    parts = list(llama.chat("speaker", MESSAGES, options=OPTIONS, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].prompt_eval_count, parts[-1].eval_count) == (whole.prompt_eval_count, 9)
    assert llama.chat("speaker", MESSAGES, options=ollama.Options(**OPTIONS), keep_alive="5m") is not None


def test_a_text_goes_on(llama: ollama.Client) -> None:
    whole = llama.generate("speaker", "Once upon a time", raw=True, options=OPTIONS)
    assert whole.prompt_eval_count == len("Once upon a time")
    parts = list(llama.generate("speaker", "Once upon a time", raw=True, options=OPTIONS, stream=True))
    assert "".join(part.response or "" for part in parts) == whole.response
    asked = llama.generate("speaker", MESSAGES[0]["content"], system="Be terse.", options=OPTIONS)
    turns = [{"role": "system", "content": "Be terse."}, *MESSAGES]
    assert asked.response == llama.chat("speaker", turns, options=OPTIONS).message.content


def test_a_form_is_kept(llama: ollama.Client) -> None:
    answer = llama.chat("speaker", MESSAGES, format=Where.model_json_schema(), options={"num_predict": 200})
    Where.model_validate_json(answer.message.content or "")


def test_a_function_is_called_and_its_result_goes_back(llama: ollama.Client) -> None:
    # A tool may be called or a text of the schema given: a schema that no text of the model is likely to end in time.
    schema: Any = {"type": "object", "properties": {"x": {"const": "y" * 300}}, "required": ["x"]}
    for seed in range(40):
        options = {"seed": seed, "num_predict": 700, "temperature": 1.5}
        parts = list(llama.chat("speaker", MESSAGES, tools=[weather], format=schema, options=options, stream=True))
        calls = [call for part in parts for call in part.message.tool_calls or []]
        assert all(call.function.name == "weather" for call in calls)
        # the client's schema lets a call have more arguments, and a random model may not come to their end in time
        calls = [call for call in calls if "place" in call.function.arguments]
        if calls:
            break
    assert calls
    places = [call.function.arguments["place"] for call in calls]
    results = [{"role": "tool", "content": weather(place), "tool_name": "weather"} for place in places]
    turns = [*MESSAGES, ollama.Message(role="assistant", tool_calls=calls), *results]
    before = llama.chat("speaker", MESSAGES, tools=[weather], options=OPTIONS)
    after = llama.chat("speaker", turns, tools=[weather], options=OPTIONS)
    assert (after.prompt_eval_count or 0) > (before.prompt_eval_count or 0) + len(str(results[0]["content"]))


def test_models(llama: ollama.Client) -> None:
    (model,) = llama.list().models
    assert model.model == "speaker"
    assert model.modified_at is not None
    assert (model.size or 0) >= 0
    shown = llama.show("speaker")
    assert shown.capabilities == ["completion", "tools"]
    assert "<tool_call>" in (shown.template or "")
    assert shown.modelinfo is not None
    assert shown.modelinfo["ftkit.context_length"] == 4096


@pytest.mark.parametrize("stream", [False, True])
def test_errors(llama: ollama.Client, caller: Server, stream: bool) -> None:
    def chat(client: ollama.Client, **how: Any) -> Any:
        answer = client.chat(**({"model": "speaker", "messages": MESSAGES, "options": OPTIONS} | how), stream=stream)
        return list(answer) if stream else answer

    with pytest.raises(ollama.ResponseError, match="nobody") as caught:
        chat(llama, model="nobody")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="mirostat"):
        chat(llama, options={"mirostat": 1})
    with pytest.raises(ollama.ResponseError, match="images"):
        chat(llama, messages=[{"role": "user", "content": "x", "images": [b"x"]}])
    with pytest.raises(ollama.ResponseError) as caught:
        chat(ollama.Client(caller.url))
    assert caught.value.status_code == 401
