"""Preparing a dataset of conversations: tokens a second, against TRL with two processes and packing.

Both go the whole way: read the file, template, tokenize, pack into rows of 1,024 tokens; ours checks rows, proves loss
masks and writes its cache to disk, too. TRL's way is the constructor of its `SFTTrainer`, over a model of a few
weights; it is given our tokenizer's own `tokenizer.json`, and must count as many tokens within 0.1 %.

Conversations have the lengths of chats (lognormal, median 180 tokens, σ 0.7, at most 1,024) and real text: pages,
code and manuals in several languages, as they lie on the machine.
"""

import json
import logging
import math
import os
import random
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench._figures import line, smollm2

CONVERSATIONS = 10_000
ROUNDS = 3
ROOM = 1024
"""Tokens of a row."""
PROCESSES = 2
PLACES = {
    "prose": ((sysconfig.get_path("purelib"), "/usr/share/doc"), ("METADATA", "*.md", "*.rst", "*.txt"), 6),
    "code": ((sysconfig.get_path("stdlib"),), ("*.py",), 3),
    "languages": (("/usr/share/vim",), ("tutor.*.utf-8",), 1),
}
"""Where text is found: folders, names, and its weight."""
FILES = 1_500
"""The most files of each kind."""
LONGEST = 200_000
"""How much of a file is taken, in bytes."""


def run() -> list[dict[str, Any]]:
    """Tokens a second of the first start, of a second one that finds the cache, and how full the rows are."""
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        write(data, CONVERSATIONS)
        rates: dict[str, list[float]] = {"ours": [], "peer": [], "constructor": [], "again": []}
        fills: dict[str, list[float]] = {"ours": [], "peer": []}
        for number in range(ROUNDS):
            cache = Path(place) / f"cache-{number}"
            tokens, seconds, fill = ours(data, cache)
            rates["ours"].append(tokens / seconds)
            rates["again"].append(tokens / ours(data, cache)[1])
            fills["ours"].append(fill)
            theirs, seconds, constructor, fill = _peer(data, Path(place) / f"peer-{number}")
            # TRL takes a special token's text in a message for the token, ours for text
            assert abs(theirs - tokens) < tokens / 1000, f"expected TRL to have about {tokens:,} tokens, got {theirs:,}"
            rates["peer"].append(theirs / seconds)
            rates["constructor"].append(theirs / constructor)
            fills["peer"].append(fill)
    return [
        line("data preparation", "tokens/s of TRL", rates["ours"], rates["peer"]),
        line("data preparation", "tokens/s of TRL, without its reading", rates["ours"], rates["constructor"]),
        line("data preparation, fill of rows", "share of TRL", fills["ours"], fills["peer"]),
        line("data preparation, second start", "tokens/s of the first start", rates["again"], rates["ours"]),
    ]


def write(path: Path, conversations: int) -> None:
    """Conversations of two to six turns, drawn by a seed."""
    from ftkit import _core

    tokenizer = _core.Tokenizer.from_gguf(smollm2())
    draw, texts = random.Random(0), {kind: list(_texts(kind)) for kind in PLACES}
    kinds = [kind for kind in texts if texts[kind]]
    assert kinds, "expected text on this machine, got none"
    weights = [PLACES[kind][2] for kind in kinds]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(conversations):
            turns = 2 * draw.randint(1, 3)
            # what the template writes around the messages are tokens, too
            written = 20 + 5 * turns
            wanted = min(ROOM - written - turns, max(turns, int(draw.lognormvariate(math.log(180), 0.7))))
            texts_of_kind = texts[draw.choices(kinds, weights)[0]]
            talk = [
                {
                    "role": ("user", "assistant")[turn % 2],
                    "content": _passage(draw, draw.choice(texts_of_kind), wanted // turns, tokenizer),
                }
                for turn in range(turns)
            ]
            file.write(json.dumps({"messages": talk}, ensure_ascii=False) + "\n")


def _texts(kind: str) -> Iterator[str]:
    folders, names, _ = PLACES[kind]
    files = sorted({path for folder in folders for name in names for path in Path(folder).rglob(name)})
    for path in random.Random(0).sample(files, min(FILES, len(files))):
        if path.is_file() and path.stat().st_size > 1000:
            yield path.read_bytes()[:LONGEST].decode("utf-8", errors="ignore")


def _passage(draw: random.Random, text: str, tokens: int, tokenizer: Any) -> str:
    """About `tokens` tokens from somewhere in the text, from the beginning of a line on."""
    start = draw.randrange(max(1, len(text) - 8 * tokens))
    start = text.find("\n", start) + 1
    ids = tokenizer.encode(text[start : start + 8 * tokens + 8], specials=False)[:tokens]
    return tokenizer.decode(ids).strip("\ufffd \n") or "…"


def ours(path: Path, cache: Path) -> tuple[int, float, float]:
    """Tokens, seconds, and how full the rows are."""
    from ftkit import _core, data
    from ftkit.config import DataConfig

    os.environ["FTKIT_CACHE"] = str(cache)
    tokenizer, template = _core.Tokenizer.from_gguf(smollm2()), _core.ChatTemplate.from_gguf(smollm2())
    start = time.perf_counter()
    train, _ = data.prepare(DataConfig(path=str(path), max_tokens=ROOM), tokenizer, template, seed=0)
    return train.rows.tokens, time.perf_counter() - start, train.rows.fill


def _peer(path: Path, place: Path) -> tuple[int, float, float, float]:
    """Tokens, seconds from the file on, seconds of the constructor alone, and how full the rows are."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from ftkit import _core

    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    place.mkdir()
    _core.Tokenizer.from_gguf(smollm2()).save(str(place), _core.ChatTemplate.from_gguf(smollm2()))
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model, tokenizer = LlamaForCausalLM(shape), AutoTokenizer.from_pretrained(place)
    settings = SFTConfig(
        output_dir=str(place / "out"), max_length=ROOM, packing=True, dataset_num_proc=PROCESSES, report_to=[],
        use_cpu=True, bf16=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(path), cache_dir=str(place / "cache"), split="train")
        read = time.perf_counter()
        trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
        end = time.perf_counter()
    lengths = [sum(row) for row in trainer.train_dataset["seq_lengths"]]
    return sum(lengths), end - start, end - read, sum(lengths) / len(lengths) / ROOM
