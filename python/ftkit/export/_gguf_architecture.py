"""A model's hyperparameters as GGUF metadata.

One table for the families that llama.cpp lays out like Llama. Rope scaling is metadata for `linear` and `yarn`, and a
tensor of factors for `llama3`.
"""

import dataclasses
from typing import Any

from torch import Tensor

from ftkit import models
from ftkit.errors import InputError
from ftkit.nn.decoder import DecoderConfig

Entry = tuple[str, str, Any]


def architecture(config: DecoderConfig) -> str:
    """GGUF's name of the architecture: the variant's own, or the one that its family shares."""
    known = models.family(config.family).GGUF_ARCHITECTURES
    return config.variant if config.variant in known else known[0]


def entries(config: DecoderConfig) -> list[Entry]:
    """The metadata of the architecture. Raises InputError for what llama.cpp has no word for."""
    name = architecture(config)
    found: list[Entry] = [
        (f"{name}.block_count", "u32", config.layers),
        (f"{name}.context_length", "u32", config.context_length),
        (f"{name}.embedding_length", "u32", config.hidden_size),
        (f"{name}.feed_forward_length", "u32", config.intermediate_size),
        (f"{name}.attention.head_count", "u32", config.heads),
        (f"{name}.attention.head_count_kv", "u32", config.key_value_heads),
        (f"{name}.attention.layer_norm_rms_epsilon", "f32", config.norm_epsilon),
        (f"{name}.vocab_size", "u32", config.vocab_size),
        (f"{name}.rope.dimension_count", "u32", config.head_dim),
    ]
    if config.head_dim * config.heads != config.hidden_size:
        found += [(f"{name}.attention.{part}_length", "u32", config.head_dim) for part in ("key", "value")]
    return found + _window(name, config) + _rope(name, config)


def rope_factors(config: DecoderConfig) -> Tensor | None:
    """What Llama 3 divides its rotation frequencies by, f32 [head_dim / 2]; None for other scalings."""
    if config.rope.kind != "llama3":
        return None
    plain = dataclasses.replace(config.rope, kind="default")
    return plain.frequencies(config.head_dim)[0] / config.rope.frequencies(config.head_dim)[0]


def _window(name: str, config: DecoderConfig) -> list[Entry]:
    windows = {config.window(layer) for layer in range(config.layers)}
    if windows == {None}:
        return []
    if name != "llama" or len(windows) > 1:
        raise InputError(f"expected attention without a window for GGUF's {name}, got windows of {windows}")
    return [(f"{name}.attention.sliding_window", "u32", windows.pop())]


def _rope(name: str, config: DecoderConfig) -> list[Entry]:
    rope = config.rope
    found: list[Entry] = [(f"{name}.rope.freq_base", "f32", rope.base)]
    if rope.kind in ("linear", "yarn"):
        found += [
            (f"{name}.rope.scaling.type", "string", rope.kind),
            (f"{name}.rope.scaling.factor", "f32", rope.factor),
        ]
    if rope.kind == "yarn":
        found.append((f"{name}.rope.scaling.original_context_length", "u32", rope.original_context_length))
    return found
