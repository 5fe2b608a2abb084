"""Qwen 3, with norms of queries and keys, and Qwen 2 and 2.5, with biases on q, k and v.

Source: Yang et al., Qwen3 Technical Report, 2025, arXiv 2505.09388; Yang et al., Qwen2 Technical Report, 2024,
arXiv 2407.10671.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ftkit.errors import InputError
from ftkit.models import _fields
from ftkit.models._family import Read
from ftkit.models._llama_like import config_json, gguf_name, gguf_sizes, hf_sizes
from ftkit.nn.decoder import DecoderConfig
from ftkit.nn.rotary import Rope

__all__ = ["GGUF_ARCHITECTURES", "HF_TYPES", "from_gguf", "from_hf", "gguf_name", "of_gguf", "to_gguf", "to_hf"]

HF_TYPES = ("qwen2", "qwen3")
GGUF_ARCHITECTURES = ("qwen2", "qwen3")


def from_hf(table: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in a config.json."""
    variant = str(table["model_type"])
    newer = variant == "qwen3"
    sizes = hf_sizes(table, head_dim=128 if newer else None)
    bias = newer and _fields.boolean(table, "attention_bias", False)
    return DecoderConfig(
        family="qwen3",
        variant=variant,
        rope=Rope.from_hf(table),
        query_key_value_bias=bias or not newer,
        output_bias=bias,
        query_key_norm=newer,
        windows=_windows(table, sizes["layers"]),
        **sizes,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a configuration."""
    newer = config.variant == "qwen3"
    table = config_json(config, "Qwen3ForCausalLM" if newer else "Qwen2ForCausalLM")
    if newer:
        table["attention_bias"] = config.output_bias
    windows = {window for window in config.windows if window is not None}
    table["use_sliding_window"] = bool(windows)
    if windows:
        table["sliding_window"] = windows.pop()
        table["layer_types"] = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return table


def from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Read) -> DecoderConfig:
    """The configuration in GGUF metadata."""
    variant = str(metadata["general.architecture"])
    return DecoderConfig(
        family="qwen3",
        variant=variant,
        query_key_value_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        query_key_norm="blk.0.attn_q_norm.weight" in shapes,
        **gguf_sizes(metadata, shapes, read),
    )


def to_gguf(config: DecoderConfig, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG001
    """The weight as it is: both turn the halves of a head."""
    return tensor


def of_gguf(config: DecoderConfig, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG001
    """The weight as it is."""
    return tensor


def _windows(table: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """By layer; transformers' rule: the first `max_window_layers` see everything, unless `layer_types` says."""
    if not _fields.boolean(table, "use_sliding_window", False):
        return ()
    window = _fields.integer(table, "sliding_window", 4096)
    types = table.get("layer_types")
    if types is None:
        first = _fields.integer(table, "max_window_layers", 28, at_least=0)
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise InputError(f"layer_types: expected {layers} of sliding_attention and full_attention, got {types!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
