"""The table of plans in the README: how long a row of tokens may be on a GPU of a size, by model and method.

    python -m bench._plans          rewrites what stands between the two marks in README.md, in some minutes

Nothing is measured: `ftkit plan` traces a step of a model of these sizes. A test computes some cells again.
"""

import dataclasses
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftkit.config import RunConfig
from ftkit.models import config_of_file, formats_of
from ftkit.nn.decoder import DecoderConfig, shapes
from ftkit.plan.budget import Gpu
from ftkit.train.planned import Case, Way

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- plans, written by `just tables` -->\n", "<!-- end of plans -->\n"
GIBIBYTES = (8, 16, 24, 48, 80)
TOKENS = (1024, 4096, 16384)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method.name": "full"},
    "full, lean": {
        "method.name": "full",
        "optimizer.name": "adamw8bit",
        "training.optimizer_in_backward": True,
        "training.max_gradient_norm": 0.0,
    },
    "LoRA": {"method.name": "lora"},
    "QLoRA": {"method.name": "lora", "model.quant": "nf4"},
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_QWEN = _LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads), strict=True))


MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": _LLAMA | _sizes(2048, 8192, 16, 32) | {"head_dim": 64, "tie_word_embeddings": True},
    "Llama 3.2 3B": _LLAMA | _sizes(3072, 8192, 28, 24) | {"tie_word_embeddings": True},
    "Llama 3.1 8B": _LLAMA | _sizes(4096, 14336, 32, 32),
    "Qwen3 14B": _QWEN | _sizes(5120, 17408, 40, 40),
    "Llama 3.1 70B": _LLAMA | _sizes(8192, 28672, 80, 64),
}
"""The sizes in the models' published configurations."""


def architecture(name: str, folder: Path) -> DecoderConfig:
    """Of one of MODELS; its config.json is written to `folder`."""
    path = folder / "config.json"
    path.write_text(json.dumps(MODELS[name]))
    return config_of_file(path)


def needed(model: DecoderConfig, method: Mapping[str, Any], tokens: int) -> int:
    """Bytes of a GPU for steps of one row, with all layers recomputed, in bfloat16."""
    settings = {"model.source": "-", "data.path": "-", "data.max_tokens": tokens, "model.dtype": "bfloat16"}
    config = RunConfig.from_toml(None, settings | method)
    gpu = Gpu(bytes=max(GIBIBYTES) << 30, expandable=True)
    case = Case.of_configuration(config, gpu, model)
    case = dataclasses.replace(case, formats=formats_of(model, config.model.quant))
    return case.plan(Way(recomputed=model.layers)).needed_bytes


def longest(model: DecoderConfig, method: Mapping[str, Any]) -> list[int]:
    """The longest row of TOKENS on each GPU of GIBIBYTES; 0 where none fits."""
    found = [0] * len(GIBIBYTES)
    weights = 2 * sum(math.prod(shape) for _, shape in shapes(model))
    if "model.quant" not in method and weights > GIBIBYTES[-1] << 30:
        return found  # they alone are too much
    for tokens in TOKENS:
        size = needed(model, method, tokens)
        found = [tokens if size <= room << 30 else before for room, before in zip(GIBIBYTES, found, strict=True)]
        if size > GIBIBYTES[-1] << 30:
            break
    return found


def lines(folder: Path) -> Iterator[str]:
    """The table, a line after the other."""
    yield f"| model | method | {' | '.join(f'{size} GiB' for size in GIBIBYTES)} |\n"
    yield f"|---|---|{'--:|' * len(GIBIBYTES)}\n"
    for name in MODELS:
        model = architecture(name, folder)
        for method, settings in METHODS.items():
            cells = [f"{tokens:,}" if tokens else "–" for tokens in longest(model, settings)]
            yield f"| {name} | {method} | {' | '.join(cells)} |\n"


def committed() -> dict[tuple[str, str], list[int]]:
    """The README's rows: tokens on each GPU, by model and method."""
    _, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (.+) \|$", rest.partition(END)[0], re.MULTILINE)
    return {
        (model, method): [int(cell.replace(",", "").replace("–", "0")) for cell in cells.split(" | ")]
        for model, method, cells in rows
        if method in METHODS
    }


def main() -> None:
    """Computes the table and writes it."""
    table = ""
    with tempfile.TemporaryDirectory() as place:
        for line in lines(Path(place)):
            table += line
            print(line, end="", file=sys.stderr, flush=True)
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}{table}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
