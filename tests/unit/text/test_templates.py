"""Real chat templates of many families render as transformers renders them."""

import copy
from typing import Any

import pytest
from conversations import CONVERSATIONS, NAMES, TEMPLATES
from transformers.utils.chat_template_utils import render_jinja_template

from ftkit._core import ChatTemplate
from ftkit.errors import InputError

pytestmark = pytest.mark.unit


def theirs(source: str, messages: Any, tools: Any, prompt: bool, extra: dict[str, Any]) -> str | None:
    """transformers' text, or None where the template raises."""
    try:
        texts, _ = render_jinja_template(
            [copy.deepcopy(messages)],
            tools=tools,
            chat_template=source,
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
            **extra,
        )
    except Exception:
        return None
    return texts[0]


def test_there_are_enough_families() -> None:
    assert len(NAMES) >= 30


@pytest.mark.parametrize("name", NAMES)
def test_renders_as_transformers_does(name: str) -> None:
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate.from_source(source, "<s>", "</s>")
    rendered, located = 0, True
    for title, (messages, tools) in CONVERSATIONS.items():
        for prompt in (False, True):
            for extra in ({}, {"enable_thinking": False}):
                expected = theirs(source, messages, tools, prompt, extra)
                try:
                    got = template.render(messages, tools, prompt, **extra)
                except InputError as error:
                    got = None
                    located &= str(error).startswith("chat template, line ")
                assert got == expected, (title, prompt, extra)
                rendered += got is not None
    assert rendered >= 20
    assert located, "every error names its line"
