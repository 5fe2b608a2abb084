"""The adapter of QA-LoRA's `joint` variant: weight and low-rank matrix are quantized together, in every forward pass.

    y = x Ŵᵀ,   Ŵ = d q + m,   q = clamp(round((W + s c B A − m) / d), 0, 2^bits − 1)
    d = exp(ρ / 8),   m = −d z / 8                  one of each for a group of inputs, stored in half precision

Optimizers move what they train by about the learning rate, whatever the gradient's size. So what is trained is chosen
such that every part moves at its own rate. c is the layer's mean step before training, as a multiple of the layers'
mean: B A moves weights in proportion to the steps of their layer, which is the paper's scale-aware optimization, and in
the mean over the layers as fast as a LoRA does. ρ moves d by a share of itself and z moves m by a share of a step, both
at an eighth of the rate: they shift many weights together. ρ and z are flat, since optimizers decay matrices, and a
step is nothing that should go to 1.

Source: He et al., EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models, 2023,
arXiv 2310.03270; Esser et al., Learned Step Size Quantization, 2020, arXiv 1902.08153; Bhalgat et al., LSQ+, 2020,
arXiv 2004.09576.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftkit import plugins
from ftkit.errors import InputError
from ftkit.kernels._groups import fit
from ftkit.kernels.joint_linear import LEAST_STEP, Grid, Trained, codes, joint_linear, stored
from ftkit.nn.linear import Weight

BLOCK = 32
"""Values in a row that share a scale in the format that holds the result; a group is a multiple of it."""

_SLOWER = 8
"""What the rates of steps and offsets are divided by. A power of two, so that dividing is exact."""

_SLAB = 1 << 18
"""Values whose first steps are found at a time."""


class Joint(nn.Module):
    """What is trained of one layer."""

    bias: Tensor | None = None
    unit: Tensor

    def __init__(self, shape: tuple[int, int], group: int, bits: int, rank: int, scale: float, like: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        count = shape[0] * (shape[1] // group)
        self.group, self.highest, self.scale, self.dtype = group, 2**bits - 1, scale, like.dtype
        self.lora_A = nn.Parameter(torch.empty(rank, shape[1], dtype=dtype, device=like.device))
        self.lora_B = nn.Parameter(torch.zeros(shape[0], rank, dtype=dtype, device=like.device))
        self.log_steps = nn.Parameter(torch.empty(count, dtype=dtype, device=like.device))
        self.zero_points = nn.Parameter(torch.empty(count, dtype=dtype, device=like.device))
        self.register_buffer("unit", torch.ones((), dtype=torch.float64, device=like.device), persistent=False)
        self._kept: tuple[object, Weight] | None = None

    @torch.no_grad()
    def fit(self, weight: Weight) -> None:
        """The first steps and offsets: those that hold W best; and from W alone the mean step, in `unit`."""
        dense = weight.dense()
        values = dense.reshape(-1, self.group)
        spans = torch.empty(values.shape[0], dtype=torch.float64, device=values.device)
        for part in _slabs(values):
            some = values[part].float()
            spans[part] = some.amax(1).double() - some.amin(1).double()
            d, m = (found.squeeze(1).double() for found in fit(some, self.highest))
            d = d.clamp_(min=LEAST_STEP)
            self.log_steps[part] = d.log().mul_(_SLOWER).to(self.log_steps.dtype)
            self.zero_points[part] = (m / d).mul_(-_SLOWER).to(self.zero_points.dtype)
        self.unit.copy_(spans.mean() / self.highest)

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] to [rows, out]."""
        if torch.is_grad_enabled():
            return joint_linear(x, weight, self._trained, self._grid)
        return self.merged_weight(weight).matmul(x)

    def merged(self, weight: Weight) -> Tensor:
        """Ŵ."""
        return self.merged_weight(weight).dense()

    def merged_weight(self, weight: Weight) -> Weight:
        """Ŵ by its codes, steps and offsets; kept while the adapter is frozen, as it is for serving.

        Raises InputError for steps or offsets that half precision cannot hold.
        """
        parameters = list(self.parameters())
        state = (weight, *((parameter._version, parameter.data_ptr()) for parameter in parameters))
        if self._kept is not None and self._kept[0] == state:
            return self._kept[1]
        d, m = stored(self._trained)
        if not bool((d.isfinite() & m.isfinite()).all()):
            raise InputError("qalora: expected steps and offsets that half precision holds, got infinite or NaN ones")
        numbers = codes(weight, self._trained, self._grid)
        blocks = self.group // BLOCK
        parts = {
            "codes": numbers[:, ::2] << 4 | numbers[:, 1::2],
            "scales": d.repeat_interleave(blocks, 1),
            "offsets": m.repeat_interleave(blocks, 1),
        }
        made: Weight = _scheme().hold(parts, weight.shape, self.dtype)
        if not parameters[0].requires_grad:
            self._kept = (state, made)
        return made

    def as_lora(self) -> tuple[Tensor, Tensor, float] | None:
        """None: no low-rank matrix is what rounding does."""
        return None

    @property
    def _trained(self) -> Trained:
        log_steps, zero_points = self.log_steps / _SLOWER, self.zero_points / _SLOWER
        return Trained(a=self.lora_A, b=self.lora_B, log_steps=log_steps, zero_points=zero_points)

    @property
    def _grid(self) -> Grid:
        return Grid(highest=self.highest, group=self.group, scale=self.scale * self.unit)


def balance(layers: Sequence[Joint]) -> None:
    """Makes each layer's `unit` a multiple of their mean."""
    mean = torch.stack([layer.unit for layer in layers]).mean()
    for layer in layers:
        layer.unit.div_(mean)


def _slabs(values: Tensor) -> list[slice]:
    """The groups in portions."""
    step = max(1, _SLAB // values.shape[1])
    return [slice(start, start + step) for start in range(0, values.shape[0], step)]


def _scheme() -> Any:
    """What holds the result: whole numbers of 4 bits, which GGUF's Q4_1 holds, too."""
    return plugins.load("quant", "int4_group").scheme(str(BLOCK))
