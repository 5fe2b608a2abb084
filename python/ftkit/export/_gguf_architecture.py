"""A model's hyperparameters as GGUF metadata, from its `config.json`.

One table for the families that llama.cpp lays out like Llama: a key of `config.json`, the key of GGUF, and its type.
Rope scaling is metadata for `linear` and `yarn`, and a tensor of factors for `llama3`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftkit.errors import InputError, did_you_mean

Entry = tuple[str, str, Any]

# config.json's model_type: GGUF's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_KEYS = [
    ("num_hidden_layers", "block_count", "u32"),
    ("max_position_embeddings", "context_length", "u32"),
    ("hidden_size", "embedding_length", "u32"),
    ("intermediate_size", "feed_forward_length", "u32"),
    ("num_attention_heads", "attention.head_count", "u32"),
    ("num_key_value_heads", "attention.head_count_kv", "u32"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon", "f32"),
    ("vocab_size", "vocab_size", "u32"),
]


def architecture(config: Mapping[str, Any]) -> str:
    """GGUF's name of the architecture. Raises InputError for a family that is not written."""
    family = config.get("model_type", "")
    if family not in ARCHITECTURES:
        raise InputError(
            f"config.json: expected a model_type that GGUF export knows ({', '.join(ARCHITECTURES)}), got {family!r}",
            did_you_mean(str(family), ARCHITECTURES),
        )
    return ARCHITECTURES[family]


def entries(config: Mapping[str, Any]) -> list[Entry]:
    """The metadata of the architecture in `config` (the content of `config.json`)."""
    name = architecture(config)
    config = {"num_key_value_heads": config.get("num_attention_heads"), **config}
    found: list[Entry] = []
    for key, meaning, kind in _KEYS:
        if not isinstance(config.get(key), int | float):
            raise InputError(f"config.json: expected a number for {key}, got {config.get(key)!r}")
        found.append((f"{name}.{meaning}", kind, config[key]))
    head = head_size(config)
    found.append((f"{name}.rope.dimension_count", "u32", head))
    if head != config["hidden_size"] // config["num_attention_heads"]:
        found += [(f"{name}.attention.{part}_length", "u32", head) for part in ("key", "value")]
    window = config.get("sliding_window")
    if isinstance(window, int) and config.get("use_sliding_window", True):
        found.append((f"{name}.attention.sliding_window", "u32", window))
    return found + _rope(name, config)


def head_size(config: Mapping[str, Any]) -> int:
    """Values of one attention head."""
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """The factors by which Llama 3 divides its rotation frequencies, [head_size / 2]; None for other scalings.

    Frequencies whose wavelength is beyond the original context are divided by `factor`, those well inside it are kept,
    and between the two the division is blended.
    """
    rope = _rope_settings(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors.float()


def _rope(name: str, config: Mapping[str, Any]) -> list[Entry]:
    rope = _rope_settings(config)
    found: list[Entry] = [(f"{name}.rope.freq_base", "f32", float(rope["rope_theta"]))]
    match rope.get("rope_type"):
        case None | "default" | "llama3":  # llama3: see `rope_factors`
            pass
        case "linear":
            found += [
                (f"{name}.rope.scaling.type", "string", "linear"),
                (f"{name}.rope.scaling.factor", "f32", float(rope["factor"])),
            ]
        case "yarn":
            found += [
                (f"{name}.rope.scaling.type", "string", "yarn"),
                (f"{name}.rope.scaling.factor", "f32", float(rope["factor"])),
                (
                    f"{name}.rope.scaling.original_context_length",
                    "u32",
                    rope.get("original_max_position_embeddings", config["max_position_embeddings"]),
                ),
            ]
        case other:
            raise InputError(
                f"config.json: expected a rope scaling that GGUF export knows (linear, llama3, yarn), got {other!r}"
            )
    return found


def _rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before), as the former."""
    settings = {"rope_theta": config.get("rope_theta", 10_000.0)}
    settings |= config.get("rope_scaling") or {}
    settings |= config.get("rope_parameters") or {}
    if "type" in settings:
        settings.setdefault("rope_type", settings["type"])
    return settings
