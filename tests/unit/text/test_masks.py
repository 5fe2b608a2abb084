"""Which tokens are trained on is proven, and ids are transformers' own."""

import copy
from pathlib import Path
from typing import Any

import pytest
from conversations import ANSWER, CALL, CONVERSATIONS, LAST, NAMES, RESULT, SYSTEM, TEMPLATES, THEN, TOOLS, USER
from models import byte_level, sentencepiece_like

from ftkit._core import ChatTemplate, Tokenizer, encode_conversation, encode_prompt
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

KINDS = ["byte_level", "normalizer", "first", "always", "never"]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        theirs = byte_level(directory)
    else:
        theirs = sentencepiece_like(directory, None if request.param == "normalizer" else request.param)
    return Tokenizer.from_dir(directory), theirs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_level(directory, pattern=LLAMA3_WORDS)
    return Tokenizer.from_dir(directory)


def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def compiled(name: str) -> ChatTemplate:
    return ChatTemplate.from_source(source(name), "<s>", "</s>")


def said(tokenizer: Tokenizer, ids: list[int], trained: list[bool]) -> list[str]:
    """The trained stretches' texts."""
    stretches: list[list[int]] = []
    before = False
    for token, train in zip(ids, trained, strict=True):
        if train and not before:
            stretches.append([])
        if train:
            stretches[-1].append(token)
        before = train
    return [tokenizer.decode(stretch, skip_special=False) for stretch in stretches]


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_transformers(pair: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = pair
    template = compiled(name)
    theirs.chat_template = source(name)
    compared = 0
    for messages, tools in CONVERSATIONS.values():
        for prompt in (False, True):
            try:
                expected = theirs.apply_chat_template(
                    copy.deepcopy(messages), tools=tools, add_generation_prompt=prompt, return_dict=False
                )
            except Exception:
                continue
            if prompt:
                got = encode_prompt(template, ours, messages, tools)
            else:
                got, _ = encode_conversation(template, ours, messages, tools, "all")
            if got != expected and not prompt:
                # a boundary that a prompt forces; then every prompt's ids must begin the conversation's
                assert ours.decode(got, skip_special=False) == ours.decode(expected, skip_special=False)
                continue
            assert got == expected
            compared += 1
    assert compared >= 8


TWO_TURNS = [SYSTEM, USER, ANSWER, THEN, LAST]
# how each family ends a turn
ENDS = {
    "chatml": "<|im_end|>",
    "zephyr": "</s>",
    "mistral_v7": "</s>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "phi4": "<|im_end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3_2507": "<|im_end|>",
    "falcon_h1": "<|im_end|>",
    "command_r": "<|END_OF_TURN_TOKEN|>",
    "deepseek_v2": "</s>",
}


@pytest.mark.parametrize("name", ENDS)
def test_trains_on_every_answer_and_its_end(tokenizer: Tokenizer, name: str) -> None:
    template = compiled(name)
    ids, trained = encode_conversation(template, tokenizer, TWO_TURNS)
    stretches = said(tokenizer, ids, trained)
    assert all(stretch.endswith(ENDS[name]) for stretch in stretches)
    texts = [stretch.removesuffix(ENDS[name]).strip() for stretch in stretches]
    assert texts == [ANSWER["content"].strip(), LAST["content"]]
    prompt = encode_prompt(template, tokenizer, TWO_TURNS[:2])
    assert ids[: len(prompt)] == prompt
    assert trained.index(True) == len(prompt)
    _, last = encode_conversation(template, tokenizer, TWO_TURNS, train_on="last")
    assert said(tokenizer, ids, last) == stretches[1:]
    _, everything = encode_conversation(template, tokenizer, TWO_TURNS, train_on="all")
    assert all(everything)


TAGGED = [
    name
    for name in NAMES
    if name.endswith(".training") and not name.startswith(("deepseek", "gpt_oss", "glm4", "nemotron3"))
]


@pytest.mark.parametrize("name", TAGGED)
def test_masks_equal_what_generation_tags_mark(tokenizer: Tokenizer, name: str, tmp_path: Path) -> None:
    """Templates that somebody marked by hand for transformers' masks: the tags' text up to the end of the turn."""
    theirs = byte_level(tmp_path, pattern=LLAMA3_WORDS)
    theirs.chat_template = source(name)
    messages = TWO_TURNS[1:]
    encoded = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    expected = said(tokenizer, encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]])
    ids, trained = encode_conversation(compiled(name), tokenizer, messages)
    assert ids == encoded["input_ids"]
    got = said(tokenizer, ids, trained)
    # the tags also take in a line's end of the prompt, or what is behind the end of the turn and is never generated
    assert got == [stretch.removesuffix("</s>").strip("\n") for stretch in expected]


def test_a_tool_call_is_trained_and_its_result_is_not(tokenizer: Tokenizer) -> None:
    messages = [USER, CALL, RESULT, LAST]
    ids, trained = encode_conversation(compiled("qwen2_5"), tokenizer, messages, TOOLS)
    call, last = said(tokenizer, ids, trained)
    assert call.startswith("<tool_call>")
    assert "Zürich" in call
    assert call.endswith("</tool_call><|im_end|>")
    assert last == LAST["content"] + "<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_an_error_but_its_last_turn_is_not(tokenizer: Tokenizer) -> None:
    template = compiled("qwen3")
    with pytest.raises(InputError, match=r"message 3: .* cannot be proven .* got \"<think>"):
        encode_conversation(template, tokenizer, TWO_TURNS)
    ids, trained = encode_conversation(template, tokenizer, TWO_TURNS, train_on="last")
    assert said(tokenizer, ids, trained) == ["<think>\n\n</think>\n\n" + LAST["content"] + "<|im_end|>"]


def test_a_prompt_that_finished_turns_lack_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"message 2: .* got \"<think>") as error:
        encode_conversation(compiled("deepseek_r1"), tokenizer, [USER, ANSWER], train_on="last")
    assert "generation prompt" in str(error.value.hint)
    _, trained = encode_conversation(compiled("deepseek_r1"), tokenizer, [USER, ANSWER], train_on="all")
    assert all(trained)


def test_a_template_without_an_end_is_an_error(tokenizer: Tokenizer) -> None:
    endless = ChatTemplate.from_source("{% for m in messages %}<|user|>{{ m.content }}\n{% endfor %}")
    with pytest.raises(InputError, match="message 2: the chat template writes no token that ends the turn") as error:
        encode_conversation(endless, tokenizer, [USER, ANSWER])
    assert "never stop" in str(error.value.hint)


def test_an_unknown_word_for_what_to_train_on_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match='expected one of assistant, last, all, got "none"'):
        encode_conversation(compiled("chatml"), tokenizer, [USER, ANSWER], train_on="none")


def test_an_answer_never_joins_its_prompt(tmp_path: Path) -> None:
    """Words that take in all line ends at once would join the prompt's to the answer's; no server's prompt does."""
    byte_level(tmp_path, pattern=LLAMA3_WORDS)
    tokenizer = Tokenizer.from_dir(tmp_path)
    template = compiled("chatml")
    messages = [USER, {"role": "assistant", "content": "\n\n1. one"}] * 2
    ids, trained = encode_conversation(template, tokenizer, messages)
    for end in (1, 3):
        prompt = encode_prompt(template, tokenizer, messages[:1])
        assert ids[: len(prompt)] == prompt, end
    assert said(tokenizer, ids, trained) == ["\n\n1. one<|im_end|>"] * 2


@pytest.mark.parametrize("content", ["  \n text", "text  \n ", "   "])
def test_white_space_that_a_special_token_takes_in(tmp_path: Path, content: str) -> None:
    theirs = byte_level(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    text = "{% for m in messages %}a <|lstrip|>{{ m.role }}<|rstrip|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    text += "{% if add_generation_prompt %}a <|lstrip|>assistant<|rstrip|>\n{% endif %}"
    template = ChatTemplate.from_source(text)
    theirs.chat_template = text
    messages = [{"role": "user", "content": content}]
    assert encode_prompt(template, tokenizer, messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    messages.append({"role": "assistant", "content": content})
    ids, trained = encode_conversation(template, tokenizer, messages)
    prompt = encode_prompt(template, tokenizer, messages[:1])
    assert ids[: len(prompt)] == prompt
    assert said(tokenizer, ids, trained) == [content + "<|im_end|>"]
