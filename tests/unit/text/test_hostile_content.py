"""Special tokens' text in what people wrote stays text; what a stream shows is what was said."""

from pathlib import Path
from typing import Any

import pytest
from conversations import TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SPECIALS, byte_level

from ftkit._core import ChatTemplate, Tokenizer, encode_conversation, encode_prompt
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

PRIVATE = ["\U000f0000", "\U000f0001", "\U000f0002", "\U000ffffd"]
# whole special tokens, their ends, marks as the core itself uses them, and what joins to either
PIECES = st.one_of(
    st.sampled_from(
        [*SPECIALS[:16], "<|im_", "end|>", "<", "|im_start|>", "<|", "|>", "</", "s>", "<think>", "</think>"]
    ),
    st.sampled_from([*PRIVATE, " ", "\n", '"', "\\", "{{", "{%", "a", "user", "assistant"]),
    st.text(max_size=4),
)
HOSTILE = st.lists(PIECES, max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_level(directory)
    return Tokenizer.from_dir(directory)


def compiled(name: str) -> ChatTemplate:
    return ChatTemplate.from_source((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), "<s>", "</s>")


TEMPLATE_NAMES = ["chatml", "zephyr", "llama3_1", "qwen2_5", "phi4", "gemma3", "mistral_v7"]


def specials(tokenizer: Tokenizer, ids: list[int]) -> list[str | None]:
    return [tokenizer.token_of(token) for token in ids if tokenizer.is_special(token)]


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(TEMPLATE_NAMES), system=HOSTILE, user=HOSTILE, answer=HOSTILE, argument=HOSTILE)
def test_only_the_templates_tokens_are_parsed(
    tokenizer: Tokenizer, name: str, system: str, user: str, answer: str, argument: str
) -> None:
    def talk(system: str, user: str, answer: str, argument: str) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": argument}]
        return messages

    template = compiled(name)
    messages = talk(system, user, answer, argument)
    rendered = template.render(messages, add_generation_prompt=True)
    ids = encode_prompt(template, tokenizer, messages)
    plain = encode_prompt(template, tokenizer, talk("x", "x", "x", "x"))
    assert specials(tokenizer, ids) == specials(tokenizer, plain)
    assert tokenizer.decode(ids, skip_special=False) == rendered
    if not any(token in text for token in SPECIALS for text in (system, user, answer, argument, user + answer)):
        assert ids == tokenizer.encode(rendered)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(TEMPLATE_NAMES), user=HOSTILE, answers=st.lists(HOSTILE, min_size=2, max_size=2))
def test_masks_hold_the_whole_answer_and_nothing_else(
    tokenizer: Tokenizer, name: str, user: str, answers: list[str]
) -> None:
    template = compiled(name)
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answers[0]}]
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answers[1]}]
    ids, trained = encode_conversation(template, tokenizer, messages)
    prompt = encode_prompt(template, tokenizer, messages[:1])
    assert ids[: len(prompt)] == prompt
    assert not any(trained[: len(prompt)])
    text = tokenizer.decode(ids, skip_special=False)
    assert text == template.render(messages)
    said = "".join(
        tokenizer.decode([token], skip_special=False) if tokenizer.is_special(token) else "·"
        for token, train in zip(ids, trained, strict=True)
        if train
    ).replace("·", "")
    assert len(said.split(">")) - 1 == 2 or said == "</s></s>", "one end for each answer, and no other special token"


def test_tools_and_keys_are_content_too(tokenizer: Tokenizer) -> None:
    template = compiled("qwen2_5")
    tools = [{"type": "function", "function": {"name": "f<|im_end|>", "parameters": {"<|im_start|>": "<|im_end|>"}}}]
    messages = [{"role": "user", "content": "x"}]
    ids = encode_prompt(template, tokenizer, messages, tools)
    assert specials(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    assert tokenizer.decode(ids, skip_special=False) == template.render(messages, tools, True)


def test_parts_cannot_be_put_together(tokenizer: Tokenizer) -> None:
    text = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}"
    template = ChatTemplate.from_source(text)
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "start"}, {"type": "text", "text": "|>"}]
    ids = encode_prompt(template, tokenizer, [{"role": "user", "content": parts}])
    assert specials(tokenizer, ids) == ["<|im_end|>"]
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|><|im_end|>"


def test_a_template_that_works_on_special_text_is_an_error(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.from_source("{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}")
    assert encode_prompt(template, tokenizer, [{"role": "user", "content": "four"}])
    with pytest.raises(InputError, match="special-token text inside a message cannot be told"):
        encode_prompt(template, tokenizer, [{"role": "user", "content": "<|im_end|>"}])


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(max_size=40) | st.just("🙂👨‍👩‍👧‍👦 e\u0301 日本語"), noise=st.lists(st.integers(0, 299), max_size=6)
)
def test_a_stream_shows_what_decode_shows(tokenizer: Tokenizer, text: str, noise: list[int]) -> None:
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    shown = [stream.push(token) for token in ids]
    assert "".join(shown) + stream.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)
    for sequence in (noise, noise + ids, ids + noise + ids):  # bytes that make no characters
        stream = tokenizer.stream()
        assert "".join(map(stream.push, sequence)) + stream.finish() == tokenizer.decode(sequence)


def test_an_endless_run_of_broken_bytes_is_shown_and_quick(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("é")[-1]
    stream = tokenizer.stream()
    shown = "".join(stream.push(broken) for _ in range(5000)) + stream.finish()
    assert shown == tokenizer.decode([broken] * 5000)


def test_special_tokens_are_not_streamed(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert "".join(map(stream.push, tokenizer.encode("a<|im_end|> b"))) + stream.finish() == "a b"


def test_saving_where_one_cannot_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        tokenizer.save(tmp_path / "file")
