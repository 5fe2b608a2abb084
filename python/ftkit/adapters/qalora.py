"""QA-LoRA: a LoRA that moves the offsets of 4-bit weights, and merges into the same 4 bits without loss.

    y = x W'ᵀ,   W' = d q + half(m + s B A)        A [rank, groups], B [out, rank], s = alpha / rank

W is stored in groups along the input, each with codes q, a scale d and a float offset m: GGUF's Q4_1 and Q5_1 (groups
of 32), or `int4_group`. The change s B A has one number a group, so W' differs from W in its offsets alone: `ftkit
merge` and `ftkit export --to gguf` write a file of the same size with the same codes. The offsets are rounded in
training as the file will hold them (the gradient passes straight through), so what was trained is what is written, to
the bit. Seen from the input it is a LoRA on x summed over each group. That sum, and not the mean, is the convention
here; adapter_config.json says so.

A starts uniform in ±1/√in, so that A x is as large as a LoRA's, and B at zero. Choose it to finetune a quantized model
that stays one: no float adapter is left, and none of the loss that quantizing again has. Weights without float offsets
can't be adapted; `all-linear` leaves them out, and a name of one is an error.

Trainable parameters: Σ over target layers of rank · (in / group + out).

Source: Xu et al., QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, 2023, arXiv 2309.14717.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.adapters._targets import ALL_LINEAR, select
from ftkit.config import option
from ftkit.errors import InputError
from ftkit.kernels.offset_linear import moved, offset_linear
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import GroupOffsets, Linear, Weight

PEFT_TYPE = "QALORA"
"""Not a type of PEFT's, which must not take these files for its own `use_qalora`: it scales means by in / group."""
PEFT_READS = False
PEFT_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

_POOLING = "sum"


@dataclass(frozen=True, kw_only=True)
class Config:
    """QA-LoRA's settings."""

    rank: int = option(16, "columns of A and B; more holds more, up to what the data needs", at_least=1, at_most=2**16)
    alpha: float = option(32.0, "scale of the update, times rank", above=0)
    target_modules: str | tuple[str, ...] = option(
        ALL_LINEAR, "all-linear, layer names such as q_proj, or a regular expression for whole names"
    )
    exclude_modules: tuple[str, ...] = option((), "layers that target_modules would select and that are left out")


class Qalora(nn.Module):
    """What moves the offsets of one layer."""

    bias: Tensor | None = None

    def __init__(self, shape: tuple[int, int], group: int, rank: int, scale: float, like: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, shape[1] // group, dtype=dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.zeros(shape[0], rank, dtype=dtype, device=like.device))
        self._kept: tuple[object, Weight] | None = None

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] to [rows, out]."""
        if torch.is_grad_enabled():
            return offset_linear(x, _offsets(weight), self.lora_A, self.lora_B, self.scale)
        return self.merged_weight(weight).matmul(x)

    def merged(self, weight: Weight) -> Tensor:
        """W'."""
        return self.merged_weight(weight).dense()

    def merged_weight(self, weight: Weight) -> Weight:
        """W as it is stored, with the moved offsets; kept while the adapter is frozen, as it is for serving.

        Raises InputError for offsets that half precision cannot hold.
        """
        state = (weight, self.lora_A._version, self.lora_B._version, self.lora_A.data_ptr(), self.lora_B.data_ptr())
        if self._kept is not None and self._kept[0] == state:
            return self._kept[1]
        offsets = _offsets(weight)
        values = moved(offsets.values, self.lora_A, self.lora_B, self.scale)
        if not bool(values.isfinite().all()):
            raise InputError("qalora: expected offsets that half precision holds, got infinite or NaN ones")
        made = offsets.replace(values)
        if not self.lora_A.requires_grad:
            self._kept = (state, made)
        return made

    def as_lora(self) -> tuple[Tensor, Tensor, float] | None:
        """None: with A repeated over each group it would be one, but for the rounding of the offsets."""
        return None


def scheme_for(source: str) -> str:
    """The scheme that a base is held as when none is asked for: a GGUF file's own blocks, else groups of 32."""
    return "gguf" if source.endswith(".gguf") else "int4_group:32"


def attach(model: Decoder, config: Config, seed: int, adapter_id: int) -> None:
    """Puts adapters on the target layers. Raises InputError for a target without float offsets."""
    linears = model.linears()
    targets = [linears[name] for name in _targets(linears, config)]
    for linear in targets:
        offsets = _offsets(linear.weight)
        adapter = Qalora(linear.shape, offsets.group, config.rank, config.alpha / config.rank, model.norm.weight)
        # a layer's first values depend on the seed and its name, and not on which other layers are targets
        digest = hashlib.sha256(f"{seed} {linear.name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(linear.shape[1])
        first = torch.empty(adapter.lora_A.shape, dtype=adapter.lora_A.dtype, device="cpu")
        with torch.no_grad():
            adapter.lora_A.copy_(first.uniform_(-bound, bound, generator=generator))
        linear.adapters[str(adapter_id)] = adapter


def notices(model: Decoder, config: Config) -> list[str]:
    """What `all-linear` leaves out."""
    linears = model.linears()
    left = sorted(set(_wanted(linears, config)) - set(_targets(linears, config)))
    if not left:
        return []
    return [f"qalora: {len(left)} layers have no float offsets and are not adapted: {', '.join(left)}"]


def to_peft(model: Decoder, config: Config) -> dict[str, Any]:
    """The method's part of adapter_config.json."""
    linears = model.linears()
    targets = _targets(linears, config)
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": targets,
        "pooling": _POOLING,
        "group_size": _offsets(linears[targets[0]].weight).group,
    }


def of_peft(table: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:  # noqa: ARG001
    """The options in an adapter_config.json. Raises InputError for another pooling."""
    if table.get("pooling") != _POOLING:
        raise InputError(f"adapter_config.json: pooling: expected {_POOLING!r}, got {table.get('pooling')!r}")
    return {
        "rank": table.get("r"),
        "alpha": table.get("lora_alpha"),
        "target_modules": tuple(table.get("target_modules") or ()),
        "exclude_modules": (),
    }


def _wanted(linears: Mapping[str, Linear], config: Config) -> list[str]:
    """The layers that the configuration names."""
    excluded = select(linears, config.exclude_modules, "exclude_modules") if config.exclude_modules else []
    return [name for name in select(linears, config.target_modules) if name not in excluded]


def _targets(linears: Mapping[str, Linear], config: Config) -> list[str]:
    """Those of them that are adapted."""
    wanted = _wanted(linears, config)
    able = [name for name in wanted if linears[name].weight.group_offsets() is not None]
    if not able or (config.target_modules != ALL_LINEAR and len(able) < len(wanted)):
        wrong = [name for name in wanted if name not in able]
        raise InputError(
            "qalora: expected weights with a float offset a group (q4_1 and q5_1 of a .gguf file, int4_group), "
            f"got {len(wrong)} without, such as {', '.join(wrong[:3])}"
            if wrong
            else "qalora: expected layers, got none",
            "--quant gguf holds a .gguf file's blocks as they are, --quant int4_group:32 converts any model",
        )
    return able


def _offsets(weight: Weight) -> GroupOffsets:
    found = weight.group_offsets()
    if found is None:
        raise InputError("qalora: expected a weight with float offsets, got one without")
    return found
