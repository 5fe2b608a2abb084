"""Tiny random models of every family, made by transformers, and loaded here from what it saves."""

import types
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ftkit import models

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "llama llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral no window": ("Mistral", {"sliding_window": None, "head_dim": None}),
    "qwen2": ("Qwen2", {"head_dim": None}),
    "qwen2 windows": ("Qwen2", {"head_dim": None, "tie_word_embeddings": True, **_WINDOWS}),
    "qwen3": ("Qwen3", {}),
    "qwen3 biases": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen3 windows": ("Qwen3", _WINDOWS),
}


GROUPED = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
"""Sizes that divide into groups of 32, for weights that are held so."""


def peer(variant: str, dtype: torch.dtype = torch.float64, seed: int = 0, sizes: dict[str, Any] | None = None) -> Any:
    """transformers' model of a variant, with random weights, biases and norms; `sizes` instead of the variant's."""
    name, changes = VARIANTS[variant]
    sizes = {
        key: value
        for key, value in (_SIZES | changes | (sizes or {})).items()
        if value is not None or key == "sliding_window"
    }
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = "sdpa"  # the eager one computes the softmax in float32 whatever the dtype
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + noise * 0.3 if "norm" in key else noise * 0.2)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)  # theirs is computed in float32 whatever the dtype
    return model


def ours(theirs: Any, folder: Path, dtype: torch.dtype = torch.float64) -> models.LoadedModel:
    """The same model, loaded from the files that transformers writes."""
    theirs.save_pretrained(folder)
    return models.load(folder, dtype=dtype)


def _norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = self.weight
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
