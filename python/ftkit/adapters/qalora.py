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

`variant = "joint"` quantizes a dense model while it trains. The adapter is merged before rounding, and both are rounded
together, with trained steps and offsets (`_joint.py` has the formulas):

    y = x Ŵᵀ,   Ŵ = d q + m,   q = clamp(round((W + s c B A − m) / d), 0, 2^bits − 1)

The model starts as W rounded to nearest, and not as it was: so its paper has it. The base stays dense in training; that
is the full-precision teacher of `--objective distill`, and text that it wrote (`ftkit data generate`) is all the data
that is needed. Choose it where rounding to nearest costs too much: 3 bits, 2, or 4 bits in large groups. The result is
in the blocks of 4 bits of `int4_group:32` and of GGUF's Q4_1, also where codes have fewer bits: files have 5 bits a
weight.

Trainable parameters: Σ over target layers of rank · (in / group + out); joint: rank · (in + out) + 2 out · in / group.

Source: Xu et al., QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, 2023, arXiv 2309.14717;
joint: He et al., EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models, 2023,
arXiv 2310.03270.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ftkit.adapters._joint import BLOCK, Joint, balance
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
    variant: Literal["offsets", "joint"] = option(
        "offsets", "offsets: moves those of 4-bit weights; joint: quantizes weights and adapter together while training"
    )
    bits: Literal[2, 3, 4] = option(4, "joint: bits of a code")
    group: int = option(32, "joint: inputs that share a step and an offset, a multiple of 32; 0: the whole row")

    def __post_init__(self) -> None:
        if self.group < 0 or self.group % BLOCK:
            raise InputError(f"group: expected a multiple of {BLOCK}, or 0, got {self.group}")
        if self.variant != "joint" and (self.bits, self.group) != (4, 32):
            raise InputError(
                f"bits and group: expected them with variant 'joint', got {self.bits} and {self.group} with "
                f"{self.variant!r}",
                "bits and groups of the other variant are those that the base's weights are held in",
            )


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


def scheme_for(source: str, options: Mapping[str, Any]) -> str:
    """The scheme that a base is held as when none is asked for: a GGUF file's own blocks, else groups of 32; joint:
    none, dense."""
    if options.get("variant") == "joint":
        return "none"
    return "gguf" if source.endswith(".gguf") else "int4_group:32"


def attach(model: Decoder, config: Config, seed: int, adapter_id: int) -> None:
    """Puts adapters on the target layers. Raises InputError for a target that cannot have one."""
    linears = model.linears()
    targets = [linears[name] for name in _targets(linears, config)]
    scale, joint = config.alpha / config.rank, []
    for linear in targets:
        adapter: Qalora | Joint
        if config.variant == "joint":
            group = config.group or linear.shape[1]
            adapter = Joint(linear.shape, group, config.bits, config.rank, scale, model.norm.weight)
            adapter.fit(linear.weight)
            joint.append(adapter)
        else:
            offsets = _offsets(linear.weight)
            adapter = Qalora(linear.shape, offsets.group, config.rank, scale, model.norm.weight)
        # a layer's first values depend on the seed and its name, and not on which other layers are targets
        digest = hashlib.sha256(f"{seed} {linear.name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(linear.shape[1])
        first = torch.empty(adapter.lora_A.shape, dtype=adapter.lora_A.dtype, device="cpu")
        with torch.no_grad():
            adapter.lora_A.copy_(first.uniform_(-bound, bound, generator=generator))
        linear.adapters[str(adapter_id)] = adapter
    if joint:
        balance(joint)


def notices(model: Decoder, config: Config) -> list[str]:
    """What `all-linear` leaves out, and what joint starts from."""
    linears = model.linears()
    targets = _targets(linears, config)
    left = sorted(set(_wanted(linears, config)) - set(targets))
    found = []
    if config.variant == "joint":
        groups = f"groups of {config.group}" if config.group else "whole rows"
        found.append(f"qalora: {len(targets)} layers start rounded to nearest, to {config.bits} bits in {groups}")
    if left:
        why = _lacking(config)
        found.append(f"qalora: {len(left)} layers have no {why} and are not adapted: {', '.join(left)}")
    return found


def to_peft(model: Decoder, config: Config) -> dict[str, Any]:
    """The method's part of adapter_config.json."""
    linears = model.linears()
    targets = _targets(linears, config)
    table = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": targets, "variant": config.variant}
    if config.variant == "joint":
        return table | {"bits": config.bits, "group_size": config.group}
    return table | {"pooling": _POOLING, "group_size": _offsets(linears[targets[0]].weight).group}


def of_peft(table: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:  # noqa: ARG001
    """The options in an adapter_config.json. Raises InputError for another pooling."""
    found = {
        "rank": table.get("r"),
        "alpha": table.get("lora_alpha"),
        "target_modules": tuple(table.get("target_modules") or ()),
        "exclude_modules": (),
        "variant": table.get("variant", "offsets"),
    }
    if found["variant"] == "joint":
        return found | {"bits": table.get("bits"), "group": table.get("group_size")}
    if table.get("pooling") != _POOLING:
        raise InputError(f"adapter_config.json: pooling: expected {_POOLING!r}, got {table.get('pooling')!r}")
    return found


def _wanted(linears: Mapping[str, Linear], config: Config) -> list[str]:
    """The layers that the configuration names."""
    excluded = select(linears, config.exclude_modules, "exclude_modules") if config.exclude_modules else []
    return [name for name in select(linears, config.target_modules) if name not in excluded]


def _targets(linears: Mapping[str, Linear], config: Config) -> list[str]:
    """Those of them that are adapted."""
    wanted = _wanted(linears, config)
    able = [name for name in wanted if _able(linears[name].weight, config)]
    if not wanted:
        raise InputError("qalora: expected layers, got none")
    if not able or (config.target_modules != ALL_LINEAR and len(able) < len(wanted)):
        wrong = [name for name in wanted if name not in able]
        got = f"got {len(wrong)} without, such as {', '.join(wrong[:3])}"
        if config.variant == "joint":
            raise InputError(f"qalora: expected weights with {_lacking(config)}, {got}", "method.group is their size")
        raise InputError(
            f"qalora: expected weights with a float offset a group (q4_1 and q5_1 of a .gguf file, int4_group), {got}",
            "--quant gguf holds a .gguf file's blocks as they are, --quant int4_group:32 converts any model",
        )
    return able


def _able(weight: Weight, config: Config) -> bool:
    if config.variant == "joint":
        return weight.shape[1] % (config.group or BLOCK) == 0
    return weight.group_offsets() is not None


def _lacking(config: Config) -> str:
    """What a layer needs."""
    return f"rows of whole groups of {config.group or BLOCK}" if config.variant == "joint" else "float offsets"


def _offsets(weight: Weight) -> GroupOffsets:
    found = weight.group_offsets()
    if found is None:
        raise InputError("qalora: expected a weight with float offsets, got one without")
    return found
