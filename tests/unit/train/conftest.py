"""A tiny random model with a byte tokenizer and a chat template, and a small dataset: everything but size is real."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of safetensors that transformers loads too."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data stays inside the tests, those in processes of their own included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 short conversations about sums."""
    dice = random.Random(1)
    pairs = [(dice.randrange(100), dice.randrange(100)) for _ in range(48)]
    rows = [conversation(f"{a} + {b}?", f"It is {a + b}." + " Yes!" * (a % 4)) for a, b in pairs]
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture
def settings(tiny_model: Path, chats: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a run that takes a second, as overrides; keywords change them (`training__seed=3`)."""

    def make(**changes: Any) -> dict[str, Any]:
        table: dict[str, Any] = {
            "model.source": str(tiny_model),
            "data.path": str(chats),
            "data.max_tokens": 128,
            "method.rank": 4,
            "method.dropout": 0.1,
            "optimizer.learning_rate": 1e-2,
            "training.max_steps": 12,
            "training.batch_rows": 2,
            "training.threads": 1,
            "output.name": "run",
            "output.runs_dir": str(tmp_path / "runs"),
            "output.checkpoint_every_steps": 3,
            "output.samples": 0,
        }
        return table | {key.replace("__", "."): value for key, value in changes.items()}

    return make
