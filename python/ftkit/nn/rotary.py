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
from dataclasses import dataclass
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
        """From a config.json: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`."""
        table = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        base = float(table.get("rope_theta") or config.get("rope_theta") or default_base)
        kind = table.get("rope_type") or table.get("type") or "default"
        if kind not in _KINDS:
            hint = did_you_mean(str(kind), _KINDS) if isinstance(kind, str) else None
            raise InputError(f"rope type: expected one of {', '.join(_KINDS)}, got {kind!r}", hint)
        if float(table.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise InputError(f"partial_rotary_factor: expected 1, got {table.get('partial_rotary_factor')}")
        if kind == "default":
            return cls(base=base)
        needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())
        for key in needed:
            if not isinstance(table.get(key), int | float):
                raise InputError(f"rope type {kind!r}: expected a number for {key!r}, got {table.get(key)!r}")
        context = int(config.get("max_position_embeddings") or 0)
        original = int(
            table.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or context
        )
        factor = float(table.get("factor") or (context / original if original else 1.0))
        attention = table.get("attention_factor")
        if attention is None and table.get("mscale") and table.get("mscale_all_dim"):
            attention = _warmth(factor, table["mscale"]) / _warmth(factor, table["mscale_all_dim"])
        return cls(
            base=base,
            kind=kind,
            factor=factor,
            original_context_length=original,
            low_frequency_factor=float(table.get("low_freq_factor") or 1.0),
            high_frequency_factor=float(table.get("high_freq_factor") or 4.0),
            beta_fast=float(table.get("beta_fast") or 32.0),
            beta_slow=float(table.get("beta_slow") or 1.0),
            attention_factor=None if attention is None else float(attention),
            truncate=bool(table.get("truncate", True)),
        )

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
