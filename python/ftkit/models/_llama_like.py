"""What the families share that published files lay out like Llama's: names, sizes and rope in GGUF."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from ftkit.errors import InputError
from ftkit.models import _fields
from ftkit.models._family import Read
from ftkit.nn.decoder import DecoderConfig
from ftkit.nn.rotary import Rope

LAYERS = 10_000
"""More layers than any model has: a number above is damage, and would take hours to find out by building them."""

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{found[1]}.{_LAYER[found[2]]}.{kind}" if found else f"{_OUTER[stem]}.{kind}"


def hf_sizes(table: Mapping[str, Any], head_dim: int | None = None) -> dict[str, Any]:
    """The sizes in a config.json, as arguments of DecoderConfig. `head_dim` is the family's own default."""
    hidden, heads = _fields.integer(table, "hidden_size"), _fields.integer(table, "num_attention_heads")
    _fields.one_of(table, "hidden_act", "silu", ("silu",))
    return checked(
        {
            "vocab_size": _fields.integer(table, "vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": _fields.integer(table, "intermediate_size"),
            "layers": _fields.integer(table, "num_hidden_layers", at_most=LAYERS),
            "heads": heads,
            "key_value_heads": _fields.integer(table, "num_key_value_heads", heads),
            "head_dim": _fields.integer(table, "head_dim", head_dim or max(hidden // heads, 1)),
            "context_length": _fields.integer(table, "max_position_embeddings"),
            "norm_epsilon": _fields.number(table, "rms_norm_eps", 1e-6),
            "tied_embeddings": _fields.boolean(table, "tie_word_embeddings", False),
        }
    )


def gguf_sizes(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Read) -> dict[str, Any]:
    """The sizes in GGUF metadata, as arguments of DecoderConfig."""
    prefix = str(metadata["general.architecture"])
    table = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items() if key.startswith(f"{prefix}.")}
    hidden, heads = _fields.integer(table, "embedding_length"), _fields.integer(table, "attention.head_count")
    head_dim = _fields.integer(table, "attention.key_length", max(hidden // heads, 1))
    vocabulary = shapes.get("token_embd.weight", (0,))[0]
    sizes = {
        "vocab_size": vocabulary or _fields.integer(table, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _fields.integer(table, "feed_forward_length"),
        "layers": _fields.integer(table, "block_count", at_most=LAYERS),
        "heads": heads,
        "key_value_heads": _fields.integer(table, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "context_length": _fields.integer(table, "context_length"),
        "norm_epsilon": _fields.single(table, "attention.layer_norm_rms_epsilon"),
        "tied_embeddings": "output.weight" not in shapes,
        "rope": _gguf_rope(table, head_dim, read if "rope_freqs.weight" in shapes else None),
    }
    if (turned := _fields.integer(table, "rope.dimension_count", head_dim)) != head_dim:
        raise InputError(f"rope.dimension_count: expected the head's size, {head_dim}, got {turned}")
    return checked(sizes)


def checked(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes again. Raises InputError where they can't belong to one model."""
    heads, groups = sizes["heads"], sizes["key_value_heads"]
    if heads % groups:
        raise InputError(f"expected attention heads to be a multiple of key and value heads, got {heads} and {groups}")
    if sizes["head_dim"] % 2:
        raise InputError(f"head_dim: expected an even number, got {sizes['head_dim']}")
    return sizes


def config_json(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    """What every config.json of these families holds."""
    return {
        "architectures": [architecture],
        "model_type": config.variant,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": config.rope.to_hf(),
    }


def _gguf_rope(table: Mapping[str, Any], head_dim: int, read: Read | None) -> Rope:
    base = _fields.number(table, "rope.freq_base", 10000.0)
    kind = _fields.one_of(table, "rope.scaling.type", "none", ("none", "linear", "yarn"))
    if read is not None:
        return _llama3(base, head_dim, read("rope_freqs.weight"))
    if kind == "none":
        return Rope(base=base)
    factor = _fields.single(table, "rope.scaling.factor")
    if kind == "linear":
        return Rope(base=base, kind="linear", factor=factor)
    original = _fields.integer(table, "rope.scaling.original_context_length", int(table["context_length"]))
    return Rope(base=base, kind="yarn", factor=factor, original_context_length=original)


def _llama3(base: float, head_dim: int, factors: torch.Tensor) -> Rope:
    """The published Llama 3 stretching whose frequencies are the default ones divided by `factors` [head_dim / 2]."""
    plain = Rope(base=base)
    divided = plain.frequencies(head_dim)[0] / factors.float()
    for factor in (8.0, 32.0, 16.0, 4.0, 2.0):  # Llama 3.1; 3.2; others' continuations
        rope = dataclasses.replace(plain, kind="llama3", factor=factor, original_context_length=8192)
        if torch.allclose(rope.frequencies(head_dim)[0], divided, rtol=1e-5, atol=0):
            return rope
    raise InputError(
        "rope_freqs.weight: expected the factors of a published Llama 3 scaling (factor 2 to 32 of 8,192 tokens), "
        f"got others, from {factors.min():g} to {factors.max():g}"
    )
