"""Full finetuning: every weight of the model is trained.

    W ← what training makes of it

The strongest method, and the one that needs memory for gradients and optimizer state of all weights. The trained
weights are the base model's own memory unless `keep_base` is set; then the base stays as it was, for objectives that
compare with it, and costs its size once more.

Trainable parameters: the model's, tied ones once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftkit.adapters._replacement import replace
from ftkit.config import option
from ftkit.nn.decoder import Decoder

PEFT_TYPE = None
PEFT_KEYS: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Full finetuning's settings."""

    keep_base: bool = option(False, "train a copy, so that the base model stays available")


def attach(model: Decoder, config: Config, seed: int, adapter_id: int) -> None:  # noqa: ARG001
    """Puts replacements on all layers."""
    layers = model.layers_by_name()
    replace(layers, list(layers), adapter_id, tied=True, share=not config.keep_base)


def to_peft(model: Decoder, config: Config) -> dict[str, Any]:  # noqa: ARG001
    """Nothing: PEFT has no such method."""
    return {}


def of_peft(table: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:  # noqa: ARG001
    """A loaded adapter does not overwrite the base model."""
    return {"keep_base": True}
