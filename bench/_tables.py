"""The table of formats in the README: what each costs in quality, and what it saves.

    python -m bench._tables          rewrites what stands between the two marks in README.md

Each format holds the weights of SmolLM2-135M-Instruct; perplexity, and KL and top-1 against the dense model, are those
of `ftkit eval --data bench/held_out.txt`. A test computes some of them again. Tokens a second are this machine's.
"""

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._figures import smollm2
from ftkit import models, plugins
from ftkit.config.cache import cache_directory
from ftkit.engine import Engine, Sampling
from ftkit.eval import perplexity
from ftkit.export import Material
from ftkit.export import gguf as target
from ftkit.models import LoadedModel
from ftkit.plan import machine

TEXT = Path(__file__).parent / "held_out.txt"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- written by `just tables` -->\n", "<!-- until here -->\n"
DENSE = "f32"
_TOKENS = 48
_HEAD = "| format | bits a weight | MB | perplexity | KL | top-1 | decode tokens/s |\n|---|--:|--:|--:|--:|--:|--:|\n"

Figures = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    bits: float
    """Bits a weight of the layers' matrices; embeddings, which are also the head, have their own."""
    megabytes: float
    """All weights, as they are held in memory."""
    perplexity: float
    kl: float
    top1: float
    tokens_per_second: float

    def line(self, name: str) -> str:
        """The line for people."""
        quality = f"{self.perplexity:.3f} | {self.kl:.5f} | {self.top1:.3f}"
        return f"| `{name}` | {self.bits:.2f} | {self.megabytes:.0f} | {quality} | {self.tokens_per_second:.0f} |\n"


def schemes() -> list[str]:
    """The schemes that convert while loading, each with its default option."""
    return [name for name in plugins.names("quant") if hasattr(plugins.load("quant", name), "scheme")]


def formats() -> list[str]:
    """All of the table, in its order: the types of `ftkit export --to gguf`, and the schemes of `--quant`."""
    return [*(kind for kind in target.TYPES if kind != "source"), *schemes()]


def dense() -> tuple[LoadedModel, Figures]:
    """The model that the others are compared with, and its log-probabilities of the text."""
    loaded = models.load(smollm2())
    return loaded, [(logs.float(), targets) for logs, targets in perplexity.log_probabilities(loaded, TEXT)]


def held_as(name: str, reference: LoadedModel, folder: Path) -> LoadedModel:
    """The model in the format `name`; a file of it is written to `folder`."""
    if name == DENSE:
        return reference
    if name in schemes():
        return models.load(smollm2(), quant=name)
    path = folder / f"{name}.gguf"
    target.write(Material.of(reference), path, name)
    return models.load(path, quant="gguf")


def quality(loaded: LoadedModel, expected: Figures) -> dict[str, Any]:
    """Perplexity, KL and top-1."""
    others = ((logs.double(), targets) for logs, targets in expected)
    return perplexity.summary(perplexity.log_probabilities(loaded, TEXT), others)


def bits_per_weight(loaded: LoadedModel) -> float:
    """Of the layers' matrices."""
    weights = [linear.weight for name, linear in loaded.model.linears().items() if name != "lm_head"]
    return 8 * sum(weight.nbytes for weight in weights) / sum(weight.shape[0] * weight.shape[1] for weight in weights)


def _megabytes(loaded: LoadedModel) -> float:
    weights = {id(layer.weight): layer.weight.nbytes for layer in loaded.model.layers_by_name().values()}
    return sum(weights.values()) / 1e6


def _speed(loaded: LoadedModel) -> float:
    """Tokens a second of one greedy answer, the best of three."""
    best = 0.0
    with Engine(loaded, pool_bytes=64 << 20) as engine:
        for first in range(3):
            start = time.perf_counter()
            engine.generate([1000 + first], Sampling(temperature=0.0, max_tokens=_TOKENS, ignore_end=True))
            best = max(best, _TOKENS / (time.perf_counter() - start))
    return best


def _rows() -> Iterator[tuple[str, Row]]:
    reference, expected = dense()
    with tempfile.TemporaryDirectory() as place:
        for name in formats():
            loaded = held_as(name, reference, Path(place))
            found = quality(loaded, expected)
            yield (
                name,
                Row(
                    bits=bits_per_weight(loaded),
                    megabytes=_megabytes(loaded),
                    perplexity=found["perplexity"],
                    kl=found["kl_mean"],
                    top1=found["top1"],
                    tokens_per_second=_speed(loaded),
                ),
            )
            (Path(place) / f"{name}.gguf").unlink(missing_ok=True)


def committed() -> dict[str, list[float]]:
    """The numbers in the README that don't depend on the machine, by format: bits, MB, perplexity, KL, top-1."""
    _, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    table, _, _ = rest.partition(END)
    lines = re.findall(r"^\| `([^`]+)` \|(.+)\|$", table, re.MULTILINE)
    return {name: [float(cell) for cell in cells.split("|")[:5]] for name, cells in lines}


def main() -> None:
    """Measures all formats and writes the table."""
    table = _HEAD
    for name, row in _rows():
        table += row.line(name)
        print(row.line(name), end="", file=sys.stderr, flush=True)
    facts = machine.report(cache_directory())
    note = f"\nTokens a second: {facts['processor']}, {torch.get_num_threads()} threads, one answer at a time.\n"
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{table}{note}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
