"""The angles of rotary position embeddings, and the ways in which published models stretch them.

    θ_i = base^(−2i / d)      angle(t, i) = t · θ_i      cos and sin of it scaled by `attention_factor`

- `default`: as above.
- `linear`: θ / factor. Source: Chen et al., Extending Context Window by Position Interpolation, 2023, arXiv 2306.15595.
- `llama3`: wavelengths beyond the original context are divided by factor, short ones kept, a ramp between them.
  Source: Llama 3.1's published configuration.
- `yarn`: a ramp over dimensions between interpolated and original angles, and warmer attention.
  Source: Peng et al., YaRN, 2023, arXiv 2309.00071.

Angles are float32 whatever the model computes in, as in transformers, so that the same positions give the same bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ftkit.errors import InputError, did_you_mean

_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions become angles."""

    base: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_context_length: int = 0
    """Of the model before it was stretched (llama3, yarn)."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original / low are divided by factor."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original / high are kept."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this in the original context are kept."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often are divided by factor."""
    attention_factor: float | None = None
    """yarn: scales cos and sin; 0.1 ln(factor) + 1 when not given."""
    truncate: bool = True
    """yarn: the ramp's ends are whole dimensions."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], default_base: float = 10000.0) -> Self:
        """From a config.json: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`.

        Raises InputError for a kind that is not known, and for values that are no positive numbers.
        """
        table = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(table, Mapping):
            raise InputError(f"rope_parameters: expected a table, got {table!r}")
        base = _number(table, "rope_theta", _number(config, "rope_theta", default_base))
        kind = table.get("rope_type") or table.get("type") or "default"
        if kind not in _KINDS:
            hint = did_you_mean(str(kind), _KINDS)
            raise InputError(f"rope type: expected one of {', '.join(_KINDS)}, got {kind!r}", hint)
        part = _number(table, "partial_rotary_factor", _number(config, "partial_rotary_factor", 1.0))
        if part != 1.0:
            raise InputError(f"partial_rotary_factor: expected 1, got {part}")
        if kind == "default":
            return cls(base=base)
        context = _number(config, "max_position_embeddings", 2048.0)
        original = _number(config, "original_max_position_embeddings", context)
        original = _number(table, "original_max_position_embeddings", original)
        attention = None
        if table.get("attention_factor") is not None:
            attention = _number(table, "attention_factor")
        rope = cls(
            base=base,
            kind=kind,
            factor=_number(table, "factor", context / original if kind == "yarn" else None),
            original_context_length=0 if kind == "linear" else int(original),
            low_frequency_factor=_number(table, "low_freq_factor", None if kind == "llama3" else 1.0),
            high_frequency_factor=_number(table, "high_freq_factor", None if kind == "llama3" else 4.0),
            beta_fast=_number(table, "beta_fast", 32.0),
            beta_slow=_number(table, "beta_slow", 1.0),
            attention_factor=attention,
            truncate=bool(table.get("truncate", True)),
        )
        if rope.low_frequency_factor >= rope.high_frequency_factor:
            low, high = rope.low_frequency_factor, rope.high_frequency_factor
            raise InputError(f"expected low_freq_factor below high_freq_factor, got {low} and {high}")
        if attention is None and table.get("mscale") and table.get("mscale_all_dim"):
            scales = [_warmth(rope.factor, _number(table, key)) for key in ("mscale", "mscale_all_dim")]
            return replace(rope, attention_factor=scales[0] / scales[1])
        return rope

    def to_hf(self) -> dict[str, Any]:
        """The table `rope_parameters` of a config.json."""
        table: dict[str, Any] = {"rope_theta": self.base, "rope_type": self.kind}
        if self.kind != "default":
            table["factor"] = self.factor
        if self.kind in ("llama3", "yarn"):
            table["original_max_position_embeddings"] = self.original_context_length
        if self.kind == "llama3":
            table |= {"low_freq_factor": self.low_frequency_factor, "high_freq_factor": self.high_frequency_factor}
        if self.kind == "yarn":
            table |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
            if self.attention_factor is not None:
                table["attention_factor"] = self.attention_factor
        return table

    def frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        """(θ f32 [head_dim / 2] on the CPU, the factor of cos and sin)."""
        powers = self.base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        theta = 1.0 / powers
        if self.kind == "linear":
            return theta / self.factor, 1.0
        if self.kind == "llama3":
            return self._llama3(theta), 1.0
        if self.kind == "yarn":
            warmth = _warmth(self.factor, 1.0) if self.attention_factor is None else self.attention_factor
            return self._yarn(powers, head_dim), warmth
        return theta, 1.0

    def _llama3(self, theta: Tensor) -> Tensor:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        wavelength = 2 * math.pi / theta
        divided = torch.where(wavelength > self.original_context_length / low, theta / self.factor, theta)
        smooth = (self.original_context_length / wavelength - low) / (high - low)
        ramp = (1 - smooth) * divided / self.factor + smooth * divided
        short = wavelength < self.original_context_length / high
        long = wavelength > self.original_context_length / low
        return torch.where(~short & ~long, ramp, divided)

    def _yarn(self, powers: Tensor, head_dim: int) -> Tensor:
        def dimension(turns: float) -> float:
            """The dimension that turns so often in the original context."""
            return (head_dim * math.log(self.original_context_length / (turns * 2 * math.pi))) / (
                2 * math.log(self.base)
            )

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
        keep = 1 - ramp
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep


class Rotary(nn.Module):
    """cos and sin for the positions of a batch."""

    theta: Tensor

    def __init__(self, rope: Rope, head_dim: int) -> None:
        super().__init__()
        theta, self.attention_factor = rope.frequencies(head_dim)
        self.register_buffer("theta", theta, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """i32 [T] to cos and sin [T, head_dim / 2] in `dtype`."""
        angles = positions.to(torch.float32).unsqueeze(1) * self.theta.to(torch.float32)
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


def _warmth(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _number(table: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number under `key`; the default where there is none. Raises InputError for anything else."""
    value = table.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{key}: expected a positive number, got {value!r}")
    return float(value)
