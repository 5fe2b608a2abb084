"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizers that the metadata was made from."""

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from models import CORPUS, byte_level
from tokenizers import Tokenizer as TheirTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_WORDS

from ftkit._core import GgufWriter, Tokenizer
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

TEXTS = [
    *CORPUS,
    "",
    " ",
    " leading, trailing ",
    "white   space \t\t runs\n\n\n  end \u00a0 x\r\n",
    "12 345 6789 don't CAN'T it's I'LL",
    "🙂👨‍👩‍👧 ﬁ Å e\u0301 ½ ² ٣٤ ǅ \u200b 𝒳",
    "unknown: ꙮ ⵣ ߷",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf(path: Path, entries: dict[str, tuple[str, Any]]) -> Path:
    metadata = [("general.architecture", "string", "llama")]
    metadata += [(f"tokenizer.ggml.{key}", kind, value) for key, (kind, value) in entries.items()]
    writer = GgufWriter(path, metadata, [])
    writer.finish()
    return path


def byte_level_entries(tokenizer: TheirTokenizer, pre: str) -> dict[str, tuple[str, Any]]:
    document = json.loads(tokenizer.to_str())
    added = {token["id"]: token["special"] for token in document["added_tokens"]}
    size = tokenizer.get_vocab_size()
    kinds = [CONTROL if added.get(i) else USER_DEFINED if i in added else NORMAL for i in range(size)]
    return {
        "model": ("string", "gpt2"),
        "pre": ("string", pre),
        "tokens": ("[string]", [tokenizer.id_to_token(i) for i in range(size)]),
        "token_type": ("[i32]", kinds),
        "merges": ("[string]", [" ".join(pair) for pair in document["model"]["merges"]]),
        "bos_token_id": ("u32", tokenizer.token_to_id("<s>")),
        "eos_token_id": ("u32", tokenizer.token_to_id("</s>")),
    }


@pytest.mark.parametrize(
    ("pre", "pattern"),
    [("smollm", None), ("qwen2", QWEN2_WORDS), ("llama-bpe", LLAMA3_WORDS)],
    ids=["smollm", "qwen2", "llama-bpe"],
)
def test_byte_level(tmp_path: Path, pre: str, pattern: str | None) -> None:
    theirs = byte_level(tmp_path, pattern=pattern).backend_tokenizer
    ours = Tokenizer.from_gguf(gguf(tmp_path / "t.gguf", byte_level_entries(theirs, pre)))
    for text in [*TEXTS, "<|im_start|>user\nhi <think></think><|im_end|>  <|im_end", "<s></s>"]:
        if pre == "qwen2":  # composes characters first
            text = unicodedata.normalize("NFC", text)
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special=False) == text
    assert (ours.bos_id, ours.eos_id) == (theirs.token_to_id("<s>"), theirs.token_to_id("</s>"))
    assert ours.is_special(theirs.token_to_id("<|im_end|>"))
    assert not ours.is_special(theirs.token_to_id("<think>"))


def trained(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, vocab_size=500, hard_vocab_limit=False,
        minloglevel=2, user_defined_symbols=["<|im_start|>", "<|im_end|>"], **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_entries(theirs: sentencepiece.SentencePieceProcessor, model: str) -> dict[str, tuple[str, Any]]:
    def kind(i: int) -> int:
        if theirs.is_unknown(i):
            return UNKNOWN
        if theirs.is_control(i):
            return CONTROL
        if theirs.is_byte(i):
            return BYTE
        return USER_DEFINED if theirs.id_to_piece(i).startswith("<|im_") else NORMAL

    size = range(theirs.get_piece_size())
    return {
        "model": ("string", model),
        "tokens": ("[string]", [theirs.id_to_piece(i) for i in size]),
        "scores": ("[f32]", [theirs.get_score(i) for i in size]),
        "token_type": ("[i32]", [kind(i) for i in size]),
        "bos_token_id": ("u32", theirs.bos_id()),
        "eos_token_id": ("u32", theirs.eos_id()),
        "unknown_token_id": ("u32", theirs.unk_id()),
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe_with_byte_fallback(tmp_path: Path, prefix: bool) -> None:
    theirs = trained(
        model_type="bpe", byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=0.98,
    )  # fmt: skip
    entries = sentencepiece_entries(theirs, "llama") | {"add_space_prefix": ("bool", prefix)}
    ours = Tokenizer.from_gguf(gguf(tmp_path / "t.gguf", entries))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("a<|im_end|>")[-1] == theirs.piece_to_id("<|im_end|>")
    ours.save(tmp_path)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(TEXTS[0]) == [theirs.bos_id(), *theirs.encode(TEXTS[0])]
    for text in ["", *TEXTS]:
        assert ours.encode_prompt(text) == loaded.encode(text)
    assert ours.encode_prompt("<s>a") == ours.encode_prompt("a"), "a text that opens by itself is not opened twice"


def test_unigram(tmp_path: Path) -> None:
    theirs = trained(model_type="unigram", normalization_rule_name="identity")
    ours = Tokenizer.from_gguf(gguf(tmp_path / "t.gguf", sentencepiece_entries(theirs, "t5")))
    for text in TEXTS:
        if "\t" in text or "\u00a0" in text:
            continue  # this rule leaves them, and so does ours; sentencepiece's trimming differs in who counts as space
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": ("string", "nothing-known")}, 'expected a known pre-tokenizer .* got "nothing-known"'),
        ({"model": ("string", "bert")}, "expected gpt2, llama or t5, got bert"),
        ({"eos_token_id": ("u32", 1 << 30)}, "eos_token_id.*: expected an id below"),
        ({"eos_token_id": ("string", "</s>")}, "eos_token_id.*: expected an integer"),
        ({"token_type": ("[i32]", [1, 2])}, "token_type.*: expected an entry for each of"),
        ({"merges": ("[string]", ["ab"])}, 'entry 0: expected two tokens, got "ab"'),
        ({"merges": ("[string]", ["nope nopenope"])}, "expected a tokenizer, got"),
        ({"tokens": ("[string]", [])}, "expected some tokens, got 0"),
        ({"model": ("string", "llama")}, "expected tokenizer.ggml.scores, got none"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, change: dict[str, tuple[str, Any]], message: str) -> None:
    theirs = byte_level(tmp_path).backend_tokenizer
    entries = byte_level_entries(theirs, "gpt-2") | change
    with pytest.raises(InputError, match=message):
        Tokenizer.from_gguf(gguf(tmp_path / "t.gguf", entries))
