"""The planner against real runs: random settings, each run by `ftkit train` in a process of its own.

Sizes, methods, optimizers, lengths, checkpointing, precision and quantization are drawn at random; what a run counts is
compared with what it was planned to take. The ratio is measured over planned: never above 1, and near it.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ftkit import plugins

SETTINGS = 200
TOGETHER = 2
"""Runs at a time, of one thread each."""
LARGE = 1 << 30
"""Bytes from which on a process' peak is judged."""
Result = dict[str, Any]


def run() -> list[dict[str, Any]]:
    """Measured over planned of all settings: tensors, and the process where it takes more than 1 GiB."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(TOGETHER) as pool:
        results = list(pool.map(lambda seed: _one(seed, Path(place)), range(SETTINGS)))
    tensors = [result["peak_bytes"] / result["planned_peak_bytes"] for result in results]
    processes = [
        result["peak_rss_bytes"] / result["planned_peak_rss_bytes"]
        for result in results
        if result["peak_rss_bytes"] > LARGE
    ]
    return [
        _line(f"peak of tensors over plan, {len(tensors)} settings", tensors),
        _line(f"peak of the process over plan, {len(processes)} settings above 1 GiB", processes),
    ]


def _line(name: str, ratios: list[float]) -> dict[str, Any]:
    return {
        "name": name,
        "ours": statistics.median(ratios),
        "peer": 1.0,
        "unit": "of the planned bytes",
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "share_of_roof": None,
    }


def _one(seed: int, place: Path) -> Result:
    dice = random.Random(seed)
    model, sizes = _model(dice, place / f"model-{seed}")
    data = _data(dice, place / f"data-{seed}.jsonl")
    settings = _settings(dice)
    words = ["train", "--model", str(model), "--data", str(data), "--max-steps", "3", "--threads", "1", "--json"]
    words += ["--name", f"run-{seed}", "--runs-dir", str(place), *(f"--set={key}={value}" for key, value in settings)]
    made = subprocess.run([sys.executable, "-m", "ftkit", *words], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"setting {seed}, {sizes} {settings}: {made.stderr[-2000:]}")
    result: Result = json.loads(made.stdout)
    shares = [result[key] / result[f"planned_{key}"] for key in ("peak_bytes", "peak_rss_bytes")]
    peaks = [result[key] / 2**20 for key in ("peak_bytes", "peak_rss_bytes")]
    words = [f"{key.partition('.')[2]}={value}" for key, value in (*sizes.items(), *settings)]
    print(
        f"{seed:3} tensors {shares[0]:.4f} of plan ({peaks[0]:.0f} MiB), process {shares[1]:.4f} ({peaks[1]:.0f} MiB): "
        + " ".join(words),
        file=sys.stderr,
        flush=True,
    )
    return result


def _settings(dice: random.Random) -> list[tuple[str, Any]]:
    """Settings of a run, by key."""
    method = dice.choice(["lora", "lora", "lora", "full"])
    found: list[tuple[str, Any]] = [
        ("method.name", method),
        ("data.max_tokens", dice.choice([160, 200, 512, 1024])),
        ("data.train_on", dice.choice(["assistant", "all"])),
        ("training.batch_rows", dice.choice([1, 1, 2, 4])),
        ("training.gradient_accumulation_steps", dice.choice([1, 1, 2, 3])),
        ("training.activation_checkpointing", dice.choice(["true", "false"])),
        ("model.dtype", dice.choice(["float32", "float32", "bfloat16"])),
        ("optimizer.name", dice.choice(plugins.names("optim"))),
        ("output.samples", dice.choice([0, 1])),
    ]
    if method == "lora":
        found.append(("method.rank", dice.choice([4, 16, 64])))
        found.append(("method.dropout", dice.choice([0.0, 0.1])))
        found.append(("model.quant", dice.choice(["none", "none", "nf4", "int8", "int4_group", "fp8_e4m3"])))
    if dice.random() < 0.4:
        found.append(("evaluation.split", 0.2))
        found.append(("evaluation.every_steps", 2))
    return found


def _model(dice: random.Random, folder: Path) -> tuple[Path, dict[str, int]]:
    """A random Llama in a directory of safetensors, with a tokenizer of bytes."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    heads, groups = dice.choice([2, 4, 8]), dice.choice([1, 2])
    sizes = {
        "vocab_size": dice.choice([300, 5000, 32000]),
        "hidden_size": 32 * heads * dice.choice([1, 2]),
        "intermediate_size": 64 * dice.choice([3, 8, 21]),
        "num_hidden_layers": dice.choice([1, 2, 3, 5, 9, 16]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
    }
    torch.manual_seed(dice.randrange(1 << 30))
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=dice.random() < 0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder, {f".{name}": size for name, size in sizes.items()}


def _data(dice: random.Random, path: Path) -> Path:
    """Conversations of random lengths."""

    def text(median: int) -> str:
        count = min(900, max(1, int(dice.lognormvariate(0, 0.8) * median)))
        return "".join(dice.choices("abcdefgh ", k=count))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(dice.choice([20, 60])):
            turns = [{"role": role, "content": text(60)} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path
