"""What GGUF export says of an architecture and a tokenizer, held against transformers' own reading of both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ftkit.errors import InputError
from ftkit.export import _gguf_architecture, _gguf_tokenizer
from ftkit.models import family_of_hf, tokenizer_of
from ftkit.nn.decoder import DecoderConfig

pytestmark = pytest.mark.unit

TEXT = ["the cat sat on the mat, 1234 times", "the dog sat too", "grüße an die katze", "def f(x):\n\treturn x + 1"]


def as_dict(entries: list[tuple[str, str, Any]]) -> dict[str, Any]:
    assert len({key for key, _, _ in entries}) == len(entries)
    return {key: value for key, _, value in entries}


def of(config: PretrainedConfig) -> DecoderConfig:
    table = json.loads(config.to_json_string(use_diff=False))
    return family_of_hf(table).from_hf(table)


def test_hyperparameters_of_a_family() -> None:
    config = Qwen3Config(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=5e5,
    )  # fmt: skip
    assert as_dict(_gguf_architecture.entries(of(config))) == {
        "qwen3.block_count": 3,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 48,
        "qwen3.feed_forward_length": 80,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.vocab_size": 97,
        "qwen3.rope.dimension_count": 16,
        "qwen3.attention.key_length": 16,
        "qwen3.attention.value_length": 16,
        "qwen3.rope.freq_base": 5e5,
    }


def test_llama_3s_rope_factors_are_transformers() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=4096, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    factors = _gguf_architecture.rope_factors(of(config))
    assert factors is not None
    torch.testing.assert_close((plain / factors).float(), theirs, rtol=1e-5, atol=0)
    assert factors.min() == 1
    assert factors.max() == 8


def test_windows_and_scalings() -> None:
    mistral = as_dict(_gguf_architecture.entries(of(MistralConfig(sliding_window=77))))
    assert mistral["llama.attention.sliding_window"] == 77
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
    yarn = as_dict(_gguf_architecture.entries(of(Qwen2Config(rope_parameters=rope))))
    assert {key: yarn[f"qwen2.rope.scaling.{key}"] for key in ("type", "factor", "original_context_length")} == {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 1024,
    }
    with pytest.raises(InputError, match="expected attention without a window for GGUF's qwen2"):
        _gguf_architecture.entries(of(Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=4)))


def save(folder: Path, tokenizer: Tokenizer, **configuration: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder


def byte_level(step: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """A byte-level BPE tokenizer with two control tokens and one that users defined."""
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([step, plain]) if step else plain
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level()
    bos, eos, tool = (tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<tool>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    save(tmp_path, tokenizer, bos_token="<s>", eos_token={"content": "</s>"}, add_eos_token=False)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, tool]}))
    size = tokenizer.get_vocab_size()
    found = as_dict(_gguf_tokenizer.entries(tmp_path, size + 3, "{{ messages }}"))
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.tokens"][:size] == [tokenizer.id_to_token(number) for number in range(size)]
    assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{size + number}]" for number in range(3)]
    kinds = found["tokenizer.ggml.token_type"]
    assert (kinds[bos], kinds[eos], kinds[tool], kinds[0], kinds[-1]) == (3, 3, 4, 1, 5)
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (bos, eos)
    assert found["tokenizer.ggml.eot_token_id"] == tool
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            "llama-bpe",
        ),
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            "qwen2",
        ),
    ],
)
def test_word_rules_have_llama_cpps_names(tmp_path: Path, pattern: str, name: str) -> None:
    document = json.loads(byte_level(pre_tokenizers.Split(Regex(pattern), "isolated")).to_str())
    assert _gguf_tokenizer.word_rule(document, tmp_path) == name


def test_digits_before_the_byte_level_are_smollms_rule(tmp_path: Path) -> None:
    steps = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = steps
    assert _gguf_tokenizer.word_rule(json.loads(tokenizer.to_str()), tmp_path) == "smollm"


def test_what_gguf_cannot_describe_is_refused(tmp_path: Path) -> None:
    save(tmp_path, byte_level(pre_tokenizers.Split(Regex(r"\d{7}"), "isolated")))
    with pytest.raises(InputError, match=r"expected a word rule that llama.cpp has a name for .* got \['.*7\}'\]"):
        _gguf_tokenizer.entries(tmp_path, 400, None)
    save(tmp_path, Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(InputError, match="expected a tokenizer of the type BPE, got 'WordLevel'"):
        _gguf_tokenizer.entries(tmp_path, 400, None)
    save(tmp_path, byte_level())
    with pytest.raises(InputError, match="expected ids below the model's 17 embeddings, got"):
        _gguf_tokenizer.entries(tmp_path, 17, None)
    save(tmp_path, byte_level(), bos_token="<start>")
    with pytest.raises(InputError, match="expected bos_token among the tokens, got '<start>'"):
        _gguf_tokenizer.entries(tmp_path, 400, None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="expected JSON"):
        _gguf_tokenizer.entries(tmp_path, 400, None)


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=340, special_tokens=special))
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]  # bytes are ordinary tokens in real files
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    found = as_dict(_gguf_tokenizer.entries(tmp_path, tokenizer.get_vocab_size(), None))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is True
    kinds = found["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6]
    assert kinds[3 + 255] == 6
    assert set(kinds[3 + 256 :]) == {1}
    scores = found["tokenizer.ggml.scores"]
    made = [tokenizer.token_to_id("".join(pair)) for pair in document["model"]["merges"]]
    assert [scores[number] for number in made] == sorted((scores[number] for number in made), reverse=True)
    assert max(scores[number] for number in range(len(scores)) if number not in made) < min(scores[m] for m in made)


def test_what_ftkit_writes_of_the_real_tokenizer_has_its_rule_again(smollm2: Path, tmp_path: Path) -> None:
    tokenizer_of(smollm2).save(tmp_path, None)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    assert _gguf_tokenizer.word_rule(document, tmp_path) == "smollm"
