"""The planner against real runs: random settings, each trained for real in a process of its own.

Sizes, methods, optimizers, lengths, checkpointing, precision and quantization are drawn at random; what a run counts is
compared with what it was planned to take. The ratio is measured over planned: never above 1, and near it.

Each eighth setting is larger, and a process that begins with `ftkit train` itself: there the process' memory is judged.
The others are forked from a process that has read the libraries, which costs a fifth, and are judged by their tensors.

    python -m bench.plan 0 100 results.jsonl      the settings 0 to 99; those that the file has are not run again
"""

import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from ftkit import models, plugins
from ftkit.nn.decoder import shapes

SETTINGS = 200
TOGETHER = 2
"""Runs at a time, of one thread each."""
LARGE = 1 << 30
"""Bytes from which on a process' peak is judged."""
WHOLE = 8
"""One in so many settings is larger, and a whole process."""
Result = dict[str, Any]


def run() -> list[dict[str, Any]]:
    """Measured over planned of all settings: tensors, and the process where it takes more than 1 GiB."""
    with tempfile.TemporaryDirectory() as place:
        results = measured(range(SETTINGS), Path(place) / "results.jsonl")
    tensors = [result["peak_bytes"] / result["planned_peak_bytes"] for result in results]
    processes = [
        result["peak_rss_bytes"] / result["planned_peak_rss_bytes"]
        for result in results
        if result["whole"] and result["peak_rss_bytes"] > LARGE
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


def measured(seeds: range, file: Path) -> list[Result]:
    """The results of the settings, which are added to the file line by line; those that it has are taken from it."""
    known = {}
    if file.exists():
        known = {result["seed"]: result for result in map(json.loads, file.read_text().splitlines())}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ftkit.train.start", "torch._dynamo"])

    def one(seed: int) -> Result:
        if seed in known:
            return known[seed]
        result = _one(seed, context)
        with file.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        return result

    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(one, seeds))


def _one(seed: int, context: Any) -> Result:
    dice, whole = random.Random(seed), seed % WHOLE == 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, sizes = _model(dice, place / "model", whole)
        data = _data(dice, place / "data.jsonl", whole)
        settings = _settings(dice, whole)
        fixed = {"model.source": str(model), "data.path": str(data), "output.runs_dir": str(place)}
        fixed |= {"training.max_steps": 3, "training.threads": 1, "output.name": "run"}
        result: Result = (_process if whole else _forked)(fixed | settings, context)
    if "error" in result:
        raise RuntimeError(f"setting {seed}, {sizes} {settings}: {result['error'][-2000:]}")
    shares = [result[key] / result[f"planned_{key}"] for key in ("peak_bytes", "peak_rss_bytes")]
    peaks = [result[key] / 2**20 for key in ("peak_bytes", "peak_rss_bytes")]
    words = [f"{key.partition('.')[2]}={value}" for key, value in (*sizes.items(), *settings.items())]
    process = f", process {shares[1]:.4f} ({peaks[1]:.0f} MiB)" if whole else ""
    told = f"{seed:3} tensors {shares[0]:.4f} of plan ({peaks[0]:.0f} MiB){process}: {' '.join(words)}"
    print(told, file=sys.stderr, flush=True)
    return result | {"seed": seed, "whole": whole, "settings": sizes | settings}


def _process(settings: dict[str, Any], _: Any) -> Result:
    """A run as people start it."""
    file = Path(settings["output.runs_dir"]) / "run.toml"
    tables: dict[str, list[str]] = {}
    for key, value in settings.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, []).append(f"{name} = {json.dumps(value)}")
    file.write_text("\n".join(line for table, lines in tables.items() for line in (f"[{table}]", *lines)) + "\n")
    words = [sys.executable, "-m", "ftkit", "train", str(file), "--json"]
    made = subprocess.run(words, capture_output=True, text=True)
    return {"error": made.stderr} if made.returncode else json.loads(made.stdout)


def _forked(settings: dict[str, Any], context: Any) -> Result:
    """The same in a child of a process that has read the libraries."""
    mine, other = context.Pipe()
    child = context.Process(target=_train, args=(settings, other), daemon=True)
    child.start()
    other.close()
    try:
        result: Result = mine.recv()
    except EOFError:
        result = {"error": "the process ended without a word"}
    child.join()
    return result


def _train(settings: dict[str, Any], pipe: Connection) -> None:
    from ftkit import train
    from ftkit.config import RunConfig
    from ftkit.errors import FtkitError

    try:
        pipe.send(train.run(RunConfig.from_toml(None, settings)).table())
    except FtkitError as error:
        pipe.send({"error": str(error)})


def _settings(dice: random.Random, whole: bool) -> dict[str, Any]:
    """Settings of a run, by key."""
    method = dice.choice(["lora", "lora", "lora", "full"])
    found: dict[str, Any] = {
        "method.name": method,
        "data.max_tokens": dice.choice([512, 1024, 2048] if whole else [160, 200, 512]),
        "data.train_on": dice.choice(["assistant", "all"]),
        "training.batch_rows": dice.choice([2, 3] if whole else [1, 1, 2, 4]),
        "training.gradient_accumulation_steps": dice.choice([1, 1, 2, 3]),
        "training.activation_checkpointing": dice.choice([False, False, True, 1]),
        "model.dtype": dice.choice(["float32", "float32", "bfloat16"]),
        "optimizer.name": dice.choice(plugins.names("optim")),
        "output.samples": dice.choice([0, 1]),
    }
    if method == "lora":
        found["method.rank"] = dice.choice([4, 16, 64])
        found["method.dropout"] = dice.choice([0.0, 0.1])
        found["model.quant"] = dice.choice(["none", "none", "nf4", "int8", "int4_group", "fp8_e4m3"])
    if dice.random() < 0.4:
        found["evaluation.split"] = 0.2
        found["evaluation.every_steps"] = 2
    return found


def _model(dice: random.Random, folder: Path, whole: bool) -> tuple[Path, dict[str, int]]:
    """A random Llama in a directory of safetensors, with a tokenizer of bytes."""
    folder.mkdir()
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    about = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    heads, groups = dice.choice([4, 8] if whole else [2, 4, 8]), dice.choice([1, 2])
    sizes = {
        "vocab_size": dice.choice([5000, 32000] if whole else [300, 5000, 12000]),
        "hidden_size": 32 * heads * dice.choice([1, 2]),
        "intermediate_size": 64 * dice.choice([8, 21] if whole else [3, 8, 15]),
        "num_hidden_layers": dice.choice([3, 4, 6] if whole else [1, 2, 3, 5]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
    }
    table = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6}
    table |= {"max_position_embeddings": 4096, "rope_theta": 1e4, "tie_word_embeddings": dice.random() < 0.5}
    table |= {"bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32", "attention_bias": False, **sizes}
    (folder / "config.json").write_text(json.dumps(table))
    dealt = torch.Generator().manual_seed(dice.randrange(1 << 30))
    tensors = {
        name: torch.randn(shape, generator=dealt) / 50 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes(models.config_of_file(folder / "config.json"))
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, {f".{name}": size for name, size in sizes.items()}


def _data(dice: random.Random, path: Path, whole: bool) -> Path:
    """Conversations of random lengths."""

    def text(median: int) -> str:
        count = min(900, max(1, int(dice.lognormvariate(0, 0.8) * median)))
        return "".join(dice.choices("abcdefgh ", k=count))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(120 if whole else dice.choice([20, 60])):
            turns = [{"role": role, "content": text(60)} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


if __name__ == "__main__":
    measured(range(int(sys.argv[1]), int(sys.argv[2])), Path(sys.argv[3]))
