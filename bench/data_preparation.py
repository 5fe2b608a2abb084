"""Preparing a dataset of conversations: rows a second, against datasets with transformers' tokenizer.

Ours goes the whole way: read, check, template, tokens, loss mask, pack, write the cache. The peer reads, renders the
same template and tokenizes, in as many processes as there are cores, and leaves masks and packing out.
"""

import json
import math
import os
import random
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from bench._figures import line, smollm2

CONVERSATIONS = 12_000
ROUNDS = 3
WORDS = re.findall(
    r"\S+",
    "the a river keeps its own time and every town along the bank has learned to wait for what it brings "
    "question answer because 1998 harbour London gross 42 percent however therefore möglich naïve function return",
)


def run() -> list[dict[str, Any]]:
    """Rows a second of the first start, and of a second one that finds the cache."""
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        _write(data)
        rates: dict[str, list[float]] = {"ours": [], "peer": [], "again": []}
        for number in range(ROUNDS):
            cache = Path(place) / f"cache-{number}"
            rates["ours"].append(_rate(lambda at=cache: _ours(data, at)))
            rates["again"].append(_rate(lambda at=cache: _ours(data, at)))
            rates["peer"].append(_rate(lambda at=Path(place) / f"peer-{number}": _peer(data, at)))
    return [
        line("data preparation", "rows/s of datasets with transformers", rates["ours"], rates["peer"]),
        line("data preparation, second start", "rows/s of the first start", rates["again"], rates["ours"]),
    ]


def _rate(prepare: Any) -> float:
    start = time.perf_counter()
    rows = prepare()
    assert rows == CONVERSATIONS, f"expected {CONVERSATIONS} rows, got {rows}"
    return CONVERSATIONS / (time.perf_counter() - start)


def _write(path: Path) -> None:
    """Conversations of two to six turns with the lengths of chats."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(CONVERSATIONS):
            turns = 2 * draw.randint(1, 3)
            words = min(900, max(12, int(draw.lognormvariate(math.log(150), 0.7)))) // turns
            talk = [
                {"role": ("user", "assistant")[turn % 2], "content": " ".join(draw.choices(WORDS, k=max(2, words)))}
                for turn in range(turns)
            ]
            file.write(json.dumps({"messages": talk}, ensure_ascii=False) + "\n")


def _ours(path: Path, cache: Path) -> int:
    from ftkit import _core, data
    from ftkit.config import DataConfig

    os.environ["FTKIT_CACHE"] = str(cache)
    tokenizer, template = _core.Tokenizer.from_gguf(smollm2()), _core.ChatTemplate.from_gguf(smollm2())
    train, _ = data.prepare(DataConfig(path=str(path), max_tokens=4096), tokenizer, template, seed=0)
    return train.statistics["rows"]


def _peer(path: Path, cache: Path) -> int:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(smollm2().parent, gguf_file=smollm2().name)

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        texts = tokenizer.apply_chat_template(rows["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    rows = datasets.load_dataset("json", data_files=str(path), cache_dir=str(cache), split="train")
    columns = rows.column_names
    return len(rows.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=columns))
