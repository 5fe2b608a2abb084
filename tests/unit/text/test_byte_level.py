"""Byte-level tokenizers are done by hand in the core: the ids are those of the tokenizers library."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CORPUS, PLAIN, SPECIALS, byte_level
from tokenizers import Tokenizer as TheirTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_WORDS

from ftkit._core import Tokenizer

pytestmark = pytest.mark.unit

LLAMA3_WORDS = QWEN2_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KINDS = {"smollm2": None, "qwen2": QWEN2_WORDS, "llama3": LLAMA3_WORDS, "gpt2": GPT2_WORDS}

pieces = st.one_of(
    st.text(max_size=6),
    st.sampled_from([line[at : at + 7] for line in CORPUS for at in range(0, len(line), 5)]),
    st.sampled_from([*SPECIALS, *PLAIN, "<|rstrip|>", "<|lstrip|>", "<|im_", "end|>"]),
    st.sampled_from(["'s", "'S", "'\u017f", "'LL", "\u0301", "٣٤", "½", "\u00a0", "\u3000", "\u0085", "\r\n", "  "]),
    st.builds(lambda letter, times: letter * times, st.sampled_from("ae 1\n!é中"), st.integers(1, 120)),
)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, TheirTokenizer]:
    """Ours and theirs of one file; Qwen's composes characters, Llama 3's takes words that are tokens whole."""
    place = tmp_path_factory.mktemp(request.param)
    byte_level(place, pattern=KINDS[request.param])
    document = json.loads((place / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "NFC"} if request.param == "qwen2" else None
    document["model"]["ignore_merges"] = request.param == "llama3"
    (place / "tokenizer.json").write_text(json.dumps(document))
    return Tokenizer.from_dir(place), TheirTokenizer.from_file(str(place / "tokenizer.json"))


@pytest.fixture(scope="module")
def literal(pair: tuple[Tokenizer, TheirTokenizer]) -> TheirTokenizer:
    """Theirs, to which special tokens are text like any other."""
    theirs = TheirTokenizer.from_str(pair[1].to_str())
    theirs.encode_special_tokens = True
    return theirs


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces, max_size=25).map("".join))
def test_ids_are_theirs(pair: tuple[Tokenizer, TheirTokenizer], literal: TheirTokenizer, text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, specials=False) == literal.encode(text, add_special_tokens=False).ids


def test_every_plane(pair: tuple[Tokenizer, TheirTokenizer]) -> None:
    ours, theirs = pair
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000 and (code < 0x2000 or code % 97 == 0)]
    random.Random(0).shuffle(codes)
    for start in range(0, len(codes), 512):
        text = "".join(f"a{chr(code)}b {chr(code)}1{chr(code)} '{chr(code)}  " for code in codes[start : start + 512])
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_threads_share_a_tokenizer(pair: tuple[Tokenizer, TheirTokenizer]) -> None:
    ours, theirs = pair
    texts = [line[at:] * 3 for line in CORPUS for at in range(0, 40, 3)]
    with ThreadPoolExecutor(4) as threads:
        ids = list(threads.map(ours.encode, texts))
    assert ids == [theirs.encode(text, add_special_tokens=False).ids for text in texts]


def test_a_long_word(pair: tuple[Tokenizer, TheirTokenizer]) -> None:
    ours, theirs = pair
    text = "".join(random.Random(1).choices("theaqu", k=300_000))
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
