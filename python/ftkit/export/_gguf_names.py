"""GGUF's names of weights, and its order of the rows that rotary embeddings turn.

Hugging Face's rotation pairs row i of a head with row i + half; llama.cpp's `llama` architecture pairs neighbours. So
the rows of q and k are reordered there, head by head: 0, half, 1, half + 1, … Other architectures keep the order.
"""

import re

from torch import Tensor

from ftkit.errors import InputError

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
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


def gguf_name(name: str) -> str:
    """GGUF's name of the weight that Hugging Face calls `name`. Raises InputError for one that has none."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER and kind in ("weight", "bias"):
        return f"{_OUTER[module]}.{kind}"
    inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if inner and inner[2] in _INNER and kind in ("weight", "bias"):
        return f"blk.{inner[1]}.{_INNER[inner[2]]}.{kind}"
    raise InputError(f"expected a weight that GGUF has a name for, got {name!r}", "--to safetensors keeps all weights")


def gguf_layout(name: str, tensor: Tensor, architecture: str, heads: int, key_value_heads: int) -> Tensor:
    """The weight (or bias) as GGUF lays it out, [rows, …]; `name` is Hugging Face's."""
    if architecture != "llama":
        return tensor
    if ".self_attn.q_proj." in name:
        return _interleaved(tensor, heads)
    if ".self_attn.k_proj." in name:
        return _interleaved(tensor, key_value_heads)
    return tensor


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    rows, *rest = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, *rest)
    return halves.transpose(1, 2).reshape(tensor.shape)
