"""SmolLM2's tokenizer and template, rebuilt from its GGUF file, give transformers' ids."""

import random
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from ftkit._core import ChatTemplate, Tokenizer, encode_conversation, encode_prompt

pytestmark = pytest.mark.model

TEXTS = [
    "",
    " ",
    "Hello, world! Don't, can't, I'LL, we've.",
    "日本語のテキスト、中文文本，한국어 텍스트 і кирилиця, العربية ١٢٣, हिन्दी, ไทย, עברית",
    "def f(x):\n\tif x == 1_000_000:\n        return {'a': [1, 2.5e-3]}  # ½ ² Ⅷ\r\n\r\n",
    "white   space \t\t runs\n\n\n  end  \u00a0\u3000\u200b x",
    "🙂👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 ﬁ Å ǅ \ufeff \x00\x01",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_end|>x<repo_name><file_sep> <|im_en d|>",
    "12 345 6789 0.1 1e9",
]


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2)


@pytest.fixture(scope="module")
def template(smollm2: Path) -> ChatTemplate:
    template = ChatTemplate.from_gguf(smollm2)
    assert template is not None
    return template


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    # transformers doesn't read tokenizer.ggml.pre; this is what the model's tokenizer.json has
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special=False) == text
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_literal_text_holds_no_special_token(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text, specials=False)
    assert not any(ours.is_special(token) for token in ids)
    assert ours.decode(ids, skip_special=False) == text


def test_megabytes_of_real_text(ours: Tokenizer, theirs: Any) -> None:
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    paths = sorted(path for root in roots for name in ("*.py", "*.md", "METADATA") for path in root.glob(f"*/{name}"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in random.Random(0).sample(paths, 120)]
    assert sum(map(len, texts)) > 1_000_000
    seconds = [0.0, 0.0]
    for text in texts:
        ids = []
        for side, encode in enumerate((ours.encode, lambda text: theirs.encode(text, add_special_tokens=False))):
            start = time.process_time()
            ids.append(encode(text))
            seconds[side] += time.process_time() - start
        assert ids[0] == ids[1]
    assert seconds[0] < seconds[1] / 2, "the library does the work: the tokenizer isn't taken for what it is"


def test_it_knows_its_ends(ours: Tokenizer) -> None:
    assert ours.eos_id == ours.id_of("<|im_end|>") == 2
    assert ours.end_ids == [0, 2]
    assert ours.vocab_size == 49152


def test_conversations_equal_transformers(ours: Tokenizer, theirs: Any, template: ChatTemplate) -> None:
    messages = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": " Hello 🙂"}] * 2
    ids, trained = encode_conversation(template, ours, messages)
    assert ids == theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    said = [token for token, train in zip(ids, trained, strict=True) if train]
    assert ours.decode(said, skip_special=False) == " Hello 🙂<|im_end|>" * 2
    prompt = encode_prompt(template, ours, messages[:1])
    assert prompt == theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt


def test_saved_it_loads_in_transformers(ours: Tokenizer, template: ChatTemplate, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours.save(tmp_path, template)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == template.source
    assert (loaded.eos_token_id, loaded.bos_token_id) == (ours.eos_id, ours.bos_id)
    again = Tokenizer.from_dir(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text, add_special_tokens=False) == ours.encode(text) == again.encode(text)
    assert again.hash == ours.hash
    found = ChatTemplate.from_dir(tmp_path)
    assert found is not None
    assert found.hash == template.hash
    messages = [{"role": "user", "content": "Hi"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == template.render(messages)
