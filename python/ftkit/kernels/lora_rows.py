"""What several adapters' low-rank matrices add to a layer's output, each on its own rows of a stream.

    y_t ← y_t + s_a (x_t A_aᵀ) B_aᵀ          for each row t under adapter a

    dlow_t = s_a dy_t B_a     dA_a = Σ dlow_tᵀ x_t     dB_a = s_a Σ dy_tᵀ (x_t A_aᵀ)     dx_t = dlow_t A_a

Rows under no adapter keep y. The `cuda` backend computes all adapters at once, of whatever ranks (segmented and batched
gather products). Matrices that lie in one memory, as those in pages of the pool do, are read where they are; others are
put one after another first. Its sums over rows have a fixed order in which no other adapter's rows take part.

Source: Chen et al., Punica: Multi-Tenant LoRA Serving, 2023, arXiv 2310.18547; Sheng et al., S-LoRA, 2023,
arXiv 2311.03285.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit.cuda import lora
from ftkit.cuda.launch import TYPES, aligned, blocks_of
from ftkit.cuda.lora import SIXTEEN, Matrices, Segments
from ftkit.kernels import _gpu, operation

Lora = tuple[Tensor, Tensor, float]
"""A [rank, in], B [out, rank] and s."""


class Routed(Protocol):
    """Which rows are under which adapter; see nn/routes.py."""

    @property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(adapter, first row, row after the last), in order."""

    @property
    def parts(self) -> tuple[tuple[int, slice | Tensor], ...]:
        """(adapter, its rows), by adapter."""


@operation
def lora_rows(y: Tensor, x: Tensor, loras: Mapping[int, Lora], routes: Routed) -> Tensor:
    """y [T, out], which is changed and returned, and x [T, in]; adapters that aren't among `loras` add nothing."""
    for adapter, rows in routes.parts:
        if adapter in loras:
            a, b, scale = loras[adapter]
            delta = functional.linear(functional.linear(x[rows], a.to(x.dtype)), b.to(x.dtype)) * scale
            if isinstance(rows, slice):
                y[rows] += delta
            else:
                y = y.index_add_(0, rows.to(y.device), delta)
    return y


def _on_gpu(y: Tensor, x: Tensor, loras: Mapping[int, Lora], routes: Routed) -> bool:  # noqa: ARG001
    """Sides of whole sixteens, matrices of one type; with gradients in bfloat16."""
    if not loras or x.ndim != 2 or not _gpu.fits(x, y) or x.shape[1] % SIXTEEN or y.shape[1] % SIXTEEN:
        return False
    matrices = [one for a, b, _ in loras.values() for one in (a, b)]
    one_type = all(one.dtype == matrices[0].dtype and one.device == x.device for one in matrices)
    known = one_type and matrices[0].dtype in TYPES
    return known and (x.dtype == torch.bfloat16 or not _trained(y, x, *matrices))


@lora_rows.backend("cuda", _on_gpu)
def _cuda(y: Tensor, x: Tensor, loras: Mapping[int, Lora], routes: Routed) -> Tensor:
    """All adapters in two launches."""
    numbers = {adapter: number for number, adapter in enumerate(loras)}
    spans = tuple((numbers.get(adapter, -1), first, end) for adapter, first, end in routes.spans)
    scales = tuple(float(scale) for _, _, scale in loras.values())
    matrices = [one for a, b, _ in loras.values() for one in (a, b)]
    found: Tensor = _LoraRows.apply(y, x, spans, scales, _trained(y, x, *matrices), *matrices)
    return found


def _trained(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


FEW = 8
"""Rows of a segment, in the mean, up to which each row by itself reads little more than tiles would."""


class _LoraRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        spans: Sequence[tuple[int, int, int]],
        scales: Sequence[float],
        trained: bool,
        *rest: Tensor,
    ) -> Tensor:
        a, b = rest[::2], rest[1::2]
        whose = _Whose.of(spans, scales, [len(one) for one in a], x.device)
        tiles = x.dtype == torch.bfloat16 and a[0].dtype != torch.float16 and (trained or len(x) > FEW * len(spans))
        gpu_lora_add(y, whose.low(x, a, tiles), *whose.places(b), whose.ranks, *whose.segments, tiles)
        if trained:
            ctx.save_for_backward(x, *rest)
            ctx.whose = whose
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        needs_y, needs_x, _, _, _, *needs = ctx.needs_input_grad
        whose: _Whose = ctx.whose
        dy, dx = dy.contiguous(), None
        a, b = ([one.to(x.dtype) for one in part] for part in (rest[::2], rest[1::2]))
        dlow = whose.low(dy, [one.T for one in b], True)
        if needs_x:
            dx = torch.zeros_like(x)
            gpu_lora_add(dx, dlow, *whose.places([one.T for one in a]), whose.ranks, *whose.segments, True)
        found: list[Tensor | None] = [None] * len(rest)
        if any(needs[::2]):
            found[::2] = gpu_lora_gradient(dlow, x, whose.ranks, *whose.segments)
        if any(needs[1::2]):  # low again: cheaper than to keep it
            found[1::2] = gpu_lora_gradient(whose.low(x, a, True), dy, whose.ranks, *whose.segments).transpose(1, 2)
        cut = (
            part[: one.shape[0], : one.shape[1]].to(one.dtype) if need and part is not None else None
            for part, one, need in zip(found, rest, needs, strict=True)
        )
        return dy if needs_y else None, dx, None, None, None, *cut


@dataclass(frozen=True)
class _Whose:
    """What all launches take of a batch's adapters, on the device."""

    ranks: Tensor
    factors: Tensor
    segments: tuple[Tensor, Tensor]
    width: int

    @classmethod
    def of(
        cls, spans: Sequence[tuple[int, int, int]], scales: Sequence[float], ranks: Sequence[int], device: torch.device
    ) -> "_Whose":
        ends = [0, *(end for _, _, end in spans)]
        numbers = torch.tensor([*ranks, *ends, *(adapter for adapter, _, _ in spans)], dtype=torch.int32).to(device)
        parts = numbers.split([len(ranks), len(ends), len(spans)])
        factors = torch.tensor(scales, dtype=torch.float32).to(device)
        return cls(parts[0], factors, (parts[1], parts[2]), blocks_of(max(ranks), SIXTEEN) * SIXTEEN)

    def low(self, x: Tensor, matrices: Sequence[Tensor], tiles: bool) -> Tensor:
        """s x Aᵀ [T, width]."""
        found: Tensor = gpu_lora_low(
            x, *self.places(matrices), self.ranks, self.factors, *self.segments, self.width, tiles
        )
        return found

    def places(self, matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(pool, i64 [adapters]): the memory of the matrices if it is one, else a copy with one after another."""
        matrices = [one.detach() for one in matrices]
        first = matrices[0]
        memory = first.untyped_storage()._cdata
        if all(one.untyped_storage()._cdata == memory and one.is_contiguous() and aligned(one) for one in matrices):
            count = first.untyped_storage().nbytes() // first.element_size()
            pool, places = first.as_strided((count,), (1,), 0), [int(one.storage_offset()) for one in matrices]
        else:
            pool = torch.cat([one.reshape(-1) for one in matrices])
            places = [0, *itertools.accumulate(one.numel() for one in matrices)][:-1]
        return pool, torch.tensor(places).to(first.device)


def _matrices(pool: Tensor, places: Tensor, ranks: Tensor, width: int) -> Matrices:
    return Matrices(pool=pool, places=places, ranks=ranks, width=width)


gpu_lora_low = _gpu.define(
    "gpu_lora_low(Tensor x, Tensor pool, Tensor places, Tensor ranks, Tensor factors, Tensor ends, Tensor adapters, "
    "int width, bool tiles) -> Tensor",
    lambda x, pool, places, ranks, factors, ends, adapters, width, tiles: lora.shrink(
        _gpu.launch,
        x,
        _matrices(pool, places, ranks, width),
        factors,
        Segments(ends=ends, adapters=adapters),
        tiles,
    ),
    lambda x, _pool, _places, _ranks, _factors, _ends, _adapters, width, _tiles: x.new_empty(x.shape[0], width),
)
gpu_lora_add = _gpu.define(
    "gpu_lora_add(Tensor(a!) y, Tensor low, Tensor pool, Tensor places, Tensor ranks, Tensor ends, Tensor adapters, "
    "bool tiles) -> ()",
    lambda y, low, pool, places, ranks, ends, adapters, tiles: lora.expand(
        _gpu.launch,
        low,
        _matrices(pool, places, ranks, low.shape[1]),
        Segments(ends=ends, adapters=adapters),
        y,
        tiles,
    ),
    lambda *_: None,
)
gpu_lora_gradient = _gpu.define(
    "gpu_lora_gradient(Tensor low, Tensor x, Tensor ranks, Tensor ends, Tensor adapters) -> Tensor",
    lambda low, x, ranks, ends, adapters: lora.gradient(
        _gpu.launch, low, x, ranks, Segments(ends=ends, adapters=adapters)
    ),
    lambda low, x, ranks, _ends, _adapters: x.new_empty(len(ranks), low.shape[1], x.shape[1], dtype=torch.float32),
)
