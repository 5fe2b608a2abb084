"""Llama 2 and 3, SmolLM2, Mistral: grouped attention with rotary positions, SwiGLU, RMS norms.

GGUF keeps the rows of q_proj and k_proj of these models in another order, since llama.cpp turns neighbouring pairs
where the published weights turn the two halves of a head.

Source: Touvron et al., LLaMA, 2023, arXiv 2302.13971; Grattafiori et al., The Llama 3 Herd of Models, 2024,
arXiv 2407.21783; Jiang et al., Mistral 7B, 2023, arXiv 2310.06825.
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

HF_TYPES = ("llama", "mistral")
GGUF_ARCHITECTURES = ("llama",)


def from_hf(table: Mapping[str, Any]) -> DecoderConfig:
    """The configuration in a config.json."""
    variant, sizes = str(table["model_type"]), hf_sizes(table)
    window = None
    if variant == "mistral":
        # transformers: 4096 when the key is missing, no window when it is null
        window = _fields.integer(table, "sliding_window") if table.get("sliding_window", 4096) else None
        window = 4096 if "sliding_window" not in table else window
    bias = _fields.boolean(table, "attention_bias", False)
    return DecoderConfig(
        family="llama",
        variant=variant,
        rope=Rope.from_hf(table),
        query_key_value_bias=bias,
        output_bias=bias,
        feed_forward_bias=_fields.boolean(table, "mlp_bias", False),
        windows=(window,) * sizes["layers"] if window else (),
        **sizes,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a configuration."""
    if config.variant == "mistral":
        return config_json(config, "MistralForCausalLM") | {"sliding_window": config.window(0)}
    table = config_json(config, "LlamaForCausalLM")
    return table | {"attention_bias": config.output_bias, "mlp_bias": config.feed_forward_bias}


def from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Read) -> DecoderConfig:
    """The configuration in GGUF metadata."""
    if "blk.0.ffn_gate_exps.weight" in shapes:
        raise InputError("expected a dense model, got a mixture of experts (ffn_gate_exps)")
    sizes = gguf_sizes(metadata, shapes, read)
    window = metadata.get("llama.attention.sliding_window")
    return DecoderConfig(
        family="llama",
        variant="mistral" if window else "llama",
        query_key_value_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        feed_forward_bias="blk.0.ffn_up.bias" in shapes,
        windows=(_fields.integer(metadata, "llama.attention.sliding_window"),) * sizes["layers"] if window else (),
        **sizes,
    )


def to_gguf(config: DecoderConfig, name: str, tensor: Tensor) -> Tensor:
    """A weight in GGUF's order of rows: in each head, halves [a, b] become pairs (a₀, b₀), (a₁, b₁), …"""
    heads = _turned_heads(config, name)
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)


def of_gguf(config: DecoderConfig, name: str, tensor: Tensor) -> Tensor:
    """A weight from GGUF's order of rows."""
    heads = _turned_heads(config, name)
    if heads is None:
        return tensor
    return tensor.reshape(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


def _turned_heads(config: DecoderConfig, name: str) -> int | None:
    if ".q_proj." in name:
        return config.heads
    return config.key_value_heads if ".k_proj." in name else None
