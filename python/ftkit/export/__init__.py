"""Targets of export: one file a target.

A target has `TYPES` and `DEFAULT_TYPE` (what `--type` may say), and `write(material, out, kind)`, which writes a file
or directory to a path that nothing is at, and returns remarks on what was done otherwise than asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is exported."""

    path: Path
    """Where the model comes from: a directory with `config.json` and tokenizer, or a GGUF file."""
    config: Mapping[str, Any]
    """The content of the model's `config.json`."""
    tensors: Mapping[str, Tensor]
    """Weights by Hugging Face's names, adapters merged in."""
    changed: frozenset[str] = frozenset()
    """Names of the weights that differ from those at `path`."""
    template: str | None = None
    """The chat template."""
    tokenizer: Any = None
    """The tokenizer, for a target that writes one anew."""
