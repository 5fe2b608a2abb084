"""LoRA: a low-rank matrix beside each frozen weight; small, mergeable, the default.

    y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ          A [rank, in], B [out, rank]
    s = alpha / rank, or alpha / √rank with `rslora`

A starts uniform in ±1/√in and B at zero, so that the model starts as it was. Extra modules (embeddings, norms, the
head) can be trained whole beside it. Choose it for most finetuning: the trained part is a few thousandths of the
model, many of them are served over one base, and merging costs nothing at run time.

Trainable parameters: Σ over target layers of rank · (in + out), and the extra modules'.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685; Kalajdzievski, A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023, arXiv 2312.03732.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftkit.adapters._files import PREFIX
from ftkit.adapters._replacement import replace
from ftkit.adapters._targets import ALL_LINEAR, select
from ftkit.config import option
from ftkit.errors import InputError
from ftkit.kernels.lora_linear import lora_linear
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import Weight

PEFT_TYPE = "LORA"
PEFT_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """LoRA's settings."""

    rank: int = option(16, "columns of A and B; more holds more, up to what the data needs", at_least=1, at_most=2**16)
    alpha: float = option(32.0, "scale of the update, times rank", above=0)
    rslora: bool = option(False, "divide alpha by √rank instead of rank: for ranks above 64")
    dropout: float = option(0.0, "share of the update's input set to zero in training", at_least=0, below=1)
    target_modules: str | tuple[str, ...] = option(
        "all-linear", "all-linear, layer names such as q_proj, or a regular expression for whole names"
    )
    modules_to_save: tuple[str, ...] = option((), "layers that are trained whole, such as embed_tokens or norm")
    ensure_weight_tying: bool = option(True, "a head that shares the embedding's weight goes on sharing it")
    exclude_modules: tuple[str, ...] = option((), "layers that target_modules would select and that are left out")
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"meaning": "ranks of single layers"})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"meaning": "alphas of single layers"})

    def __post_init__(self) -> None:
        for name, value in [*self.rank_pattern.items(), *self.alpha_pattern.items()]:
            if value <= 0:
                raise InputError(f"expected positive ranks and alphas, got {value} for {name!r}")


class Lora(nn.Module):
    """The low-rank matrix of one layer."""

    bias: Tensor | None = None

    def __init__(self, shape: tuple[int, int], rank: int, scale: float, dropout: float, like: Tensor) -> None:
        super().__init__()
        # trained in float32 at least: at bfloat16's precision small updates would round away
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.scale, self.dropout = scale, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, shape[1], dtype=dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.zeros(shape[0], rank, dtype=dtype, device=like.device))

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] to [rows, out]."""
        if self.training and self.dropout:
            a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
            low = functional.linear(functional.dropout(x, self.dropout), a)  # [rows, rank]
            return weight.matmul(x) + functional.linear(low * self.scale, b)
        return lora_linear(x, weight, self.lora_A, self.lora_B, self.scale)

    def merged(self, weight: Weight) -> Tensor:
        """W + s B A, computed in float32 at least, in W's dtype."""
        dense = weight.dense()
        delta = self.scale * (self.lora_B.detach() @ self.lora_A.detach())
        return (dense.to(delta.dtype) + delta).to(dense.dtype)

    def merged_weight(self, weight: Weight) -> Weight | None:  # noqa: ARG002
        """None: W's codes cannot hold it."""
        return None

    def as_lora(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and s; None while dropout is at work."""
        return None if self.training and self.dropout else (self.lora_A, self.lora_B, self.scale)


def attach(model: Decoder, config: Config, seed: int, adapter_id: int) -> None:
    """Puts LoRAs on the target layers, and replacements on `modules_to_save`."""
    linears, layers = model.linears(), model.layers_by_name()
    saved = select(layers, config.modules_to_save, "modules_to_save") if config.modules_to_save else []
    excluded = select(linears, config.exclude_modules, "exclude_modules") if config.exclude_modules else []
    targets = [n for n in select(linears, config.target_modules) if n not in saved and n not in excluded]
    replace(layers, saved, adapter_id, config.ensure_weight_tying, share=False)
    for name in targets:
        linear = linears[name]
        if str(adapter_id) in linear.adapters:
            raise InputError(f"expected {name} in target_modules or, through tied embeddings, trained whole; got both")
        rank = _of(name, config.rank_pattern, config.rank)
        alpha = _of(name, config.alpha_pattern, config.alpha)
        scale = alpha / (math.sqrt(rank) if config.rslora else rank)
        lora = Lora(linear.shape, rank, scale, config.dropout, model.norm.weight)
        # a layer's first values depend on the seed and its name, and not on which other layers are targets
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(linear.shape[1])
        first = torch.empty(lora.lora_A.shape, dtype=lora.lora_A.dtype, device="cpu")
        with torch.no_grad():
            lora.lora_A.copy_(first.uniform_(-bound, bound, generator=generator))
        linear.adapters[str(adapter_id)] = lora


def to_peft(model: Decoder, config: Config) -> dict[str, Any]:
    """The method's part of adapter_config.json."""
    layers = list(model.layers_by_name())
    targets: str | list[str] = ALL_LINEAR
    if config.target_modules != ALL_LINEAR:
        # written as names: peft would try an expression on modules that have no weights, too
        pattern = isinstance(config.target_modules, str)
        targets = select(model.linears(), config.target_modules) if pattern else list(config.target_modules)
    saved = select(layers, config.modules_to_save, "modules_to_save") if config.modules_to_save else None
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "modules_to_save": saved,  # in full: peft takes every module whose name ends so, `norm` for all norms
        "ensure_weight_tying": config.ensure_weight_tying and bool(config.modules_to_save) and _tied(model),
        "exclude_modules": list(config.exclude_modules) or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def of_peft(table: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The options of a LoRA from PEFT; `keys` are those of its tensors.

    Raises InputError for what would be computed differently here.
    """
    plain = {"bias": ("none", None), "layers_pattern": (None,), "layers_to_transform": (None,)}
    differing = [
        *("use_dora", "use_qalora", "fan_in_fan_out", "lora_bias", "trainable_token_indices", "layer_replication"),
        *("target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora", "megatron_config"),
    ]
    problems = [f"{key}: expected it unset, got {table[key]!r}" for key in differing if table.get(key)]
    problems += [
        f"{key}: expected {allowed[0]!r}, got {table[key]!r}"
        for key, allowed in plain.items()
        if key in table and table[key] not in allowed
    ]
    first = table.get("init_lora_weights", True)
    if isinstance(first, str) and first.partition("_")[0].lower() in ("pissa", "olora", "corda", "loftq", "lora"):
        problems.append(f"init_lora_weights: expected one that leaves the base as it is, got {first!r}")
    if problems:
        raise InputError("adapter_config.json: " + "\n  ".join(problems))
    targets = table.get("target_modules") or ()
    excluded = table.get("exclude_modules") or ()
    if isinstance(excluded, str):
        raise InputError(f"exclude_modules: expected a list, got the pattern {excluded!r}")
    saved = tuple(table.get("modules_to_save") or ())
    names = [key.removeprefix(PREFIX).removesuffix(".weight") for key in keys if key.endswith(".weight")]
    return {
        "rank": table.get("r", 8),
        "alpha": table.get("lora_alpha", 8),
        "rslora": table.get("use_rslora", False),
        "dropout": table.get("lora_dropout", 0.0),
        "target_modules": targets if isinstance(targets, str) else tuple(sorted(targets)),
        "modules_to_save": tuple(name for name in names if name.endswith(saved)) if saved else (),
        "ensure_weight_tying": table.get("ensure_weight_tying", False),
        "exclude_modules": tuple(excluded),
        "rank_pattern": dict(table.get("rank_pattern") or {}),
        "alpha_pattern": dict(table.get("alpha_pattern") or {}),
    }


def _of(name: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value for a layer: of the first key that is, as an expression, its name or the end of it (PEFT's rule)."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise InputError(f"rank_pattern and alpha_pattern: expected names, got {key!r} ({error})") from None
    return default


def _tied(model: Decoder) -> bool:
    return model.lm_head.weight is model.embed_tokens.weight
