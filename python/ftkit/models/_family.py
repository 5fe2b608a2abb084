"""What a family's file offers, and how the file for a model is found.

A family is one file in this room with these module attributes:

    HF_TYPES            the `model_type`s of config.json that it reads
    GGUF_ARCHITECTURES  the `general.architecture`s that it reads
    from_hf(table)      config.json → DecoderConfig
    to_hf(config)       DecoderConfig → config.json
    from_gguf(metadata, shapes, read)   GGUF metadata and tensors → DecoderConfig
    gguf_name(name)     a published tensor name → GGUF's
    to_gguf(config, name, tensor), of_gguf(config, name, tensor)
                        a weight as GGUF lays it out, and back
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor

from ftkit import plugins
from ftkit.errors import InputError, did_you_mean
from ftkit.nn.decoder import DecoderConfig

Read = Callable[[str], Tensor]


class Family(Protocol):
    """A family's file."""

    HF_TYPES: tuple[str, ...]
    GGUF_ARCHITECTURES: tuple[str, ...]

    def from_hf(self, table: Mapping[str, Any]) -> DecoderConfig:
        """The configuration in a config.json. Raises InputError for what the family can't express."""

    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The config.json of a configuration."""

    def from_gguf(
        self, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Read
    ) -> DecoderConfig:
        """The configuration in GGUF metadata; `shapes` and `read` give its tensors."""

    def gguf_name(self, name: str) -> str:
        """`model.layers.0.mlp.up_proj.weight` as GGUF calls it."""

    def to_gguf(self, config: DecoderConfig, name: str, tensor: Tensor) -> Tensor:
        """The weight of a published name in GGUF's order of rows."""

    def of_gguf(self, config: DecoderConfig, name: str, tensor: Tensor) -> Tensor:
        """The weight of a published name from GGUF's order of rows."""


def family(name: str) -> Family:
    """The family of that name."""
    return cast(Family, plugins.load("models", name))


def family_of_hf(table: Mapping[str, Any]) -> Family:
    """The family that reads this config.json. Raises InputError, naming those that are read, when none does."""
    return _find("HF_TYPES", "model_type", table.get("model_type"))


def family_of_gguf(metadata: Mapping[str, Any]) -> Family:
    """The family that reads a GGUF file with this metadata. Raises InputError when none does."""
    return _find("GGUF_ARCHITECTURES", "general.architecture", metadata.get("general.architecture"))


def _find(attribute: str, key: str, value: Any) -> Family:
    known: dict[str, str] = {}
    for name in plugins.names("models"):
        known |= dict.fromkeys(getattr(plugins.load("models", name), attribute), name)
    if not isinstance(value, str) or value not in known:
        hint = did_you_mean(value, known) if isinstance(value, str) else None
        raise InputError(f"{key}: expected one of {', '.join(sorted(known))}, got {value!r}", hint)
    return family(known[value])
