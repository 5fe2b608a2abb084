"""A linear layer over a ragged batch: a frozen weight, and adapters that change what it does for their rows.

    y = x Wᵀ + b                                    rows without an adapter
    y = adapter.forward(x, W) + b                   rows of one adapter
    y = x Wᵀ + b, then y[rows] += s (x[rows] Aᵀ) Bᵀ   where adapters meet in a batch and are LoRAs

`Weight` and `Adapter` are the two protocols in which quantization schemes and finetuning methods meet without knowing
each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ftkit._core import CodedMatrix, PackedMatrix
from ftkit.kernels.block_matmul import block_matmul, block_matmul_transposed, multiplies
from ftkit.kernels.lora_linears import Origin, lora_linears
from ftkit.kernels.lora_rows import lora_rows
from ftkit.nn.routes import Routes


@dataclass(frozen=True)
class GroupOffsets:
    """What a weight adds to each group of values in a row: W = scale · code + offset, the offsets stored apart."""

    group: int
    """Values in a group, along the input."""
    values: Tensor
    """float16 [out, in / group]; to be read, not written."""
    replace: "Callable[[Tensor], Weight]"
    """The weight with these offsets, and with its codes and scales as they are."""


@runtime_checkable
class Weight(Protocol):
    """The matrix W [out, in] of a linear layer, stored in whatever way."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""

    @property
    def nbytes(self) -> int:
        """What is stored, in bytes."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] to x Wᵀ [rows, out], a new tensor in x's dtype; differentiable in x."""

    def matmul_transposed(self, dy: Tensor) -> Tensor:
        """dy [rows, out] to dy W [rows, in], a new tensor in dy's dtype: the gradient of `matmul` in x."""

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows of W by their numbers, i32 or i64 [T], to [T, in]: what an embedding looks up."""

    def dense(self) -> Tensor:
        """W as a plain tensor [out, in] in the dtype that the model computes in; to be read, not written."""

    def stored(self) -> tuple[str, Tensor] | CodedMatrix | PackedMatrix | None:
        """What the core multiplies with: (format, blocks uint8 [out, bytes of a row]), or its own; None for what it
        doesn't take."""

    def blocks_of_file(self) -> tuple[str, Tensor] | None:
        """(format, blocks) of GGUF that dequantize to `dense` to the bit; None for what has no codes of GGUF's."""

    def group_offsets(self) -> GroupOffsets | None:
        """The floats that are added to groups of values; None for a way of storing that has none."""

    def replace_dense(self, dense: Tensor) -> "Weight":
        """A weight stored in the same way that holds `dense` as nearly as that way can."""


class DenseWeight(nn.Module):
    """W as a plain tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.training = False  # until a model that trains takes it along
        self.tensor = nn.Parameter(tensor, requires_grad=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] to [rows, out]."""
        stored = None if self.tensor.requires_grad else self.stored()
        if stored is None or not multiplies(x, self.training):
            return functional.linear(x, self.tensor)
        return frozen_matmul(x, self, lambda x: block_matmul(x, *stored, self.training))

    def matmul_transposed(self, dy: Tensor) -> Tensor:
        """dy [rows, out] to [rows, in]."""
        stored = self.stored()
        if stored is None or not multiplies(dy, True):
            return dy @ self.tensor.detach()
        return block_matmul_transposed(dy, *stored)

    def rows(self, numbers: Tensor) -> Tensor:
        """i32 or i64 [T] to [T, in]."""
        return functional.embedding(numbers, self.tensor)

    def dense(self) -> Tensor:
        """The tensor itself."""
        return self.tensor.detach()

    def stored(self) -> tuple[str, Tensor] | None:
        """Float32 and bfloat16 on the CPU are formats of the core's."""
        tensor = self.tensor.detach()
        kind = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(tensor.dtype)
        if kind is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        return kind, tensor.view(torch.uint8)

    def blocks_of_file(self) -> tuple[str, Tensor] | None:
        """None: floats have no codes."""
        return None

    def group_offsets(self) -> GroupOffsets | None:
        """None: floats are one by one."""
        return None

    def replace_dense(self, dense: Tensor) -> "DenseWeight":
        """A dense weight of these values."""
        return DenseWeight(dense.to(self.tensor.dtype))


def frozen_matmul(x: Tensor, weight: Weight, product: Callable[[Tensor], Tensor]) -> Tensor:
    """x [rows, in] to `product(x)` [rows, out], x Wᵀ; for the way back nothing is kept but the weight."""
    y: Tensor = _FrozenMatmul.apply(x, weight, product)
    return y


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, product: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.weight = weight
        return product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.weight.matmul_transposed(dy), None, None


class Adapter(Protocol):
    """What a finetuning method puts on a linear layer."""

    bias: Tensor | None
    """A bias [out] in place of the layer's own, or None."""

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] to the adapted layer's output [rows, out], without bias."""

    def merged(self, weight: Weight) -> Tensor:
        """The dense [out, in] that does what the adapter does on `weight`."""

    def merged_weight(self, weight: Weight) -> Weight | None:
        """Codes that dequantize to `merged` to the bit: in `weight`'s own format, or in that which the method quantizes
        to; None where there are none."""

    def as_lora(self) -> tuple[Tensor, Tensor, float] | None:
        """(A [rank, in], B [out, rank], scale) with forward(x) = x Wᵀ + scale (x Aᵀ) Bᵀ right now, or None."""


class Linear(nn.Module):
    """A linear layer under its published name, with its adapters by id."""

    weight: Weight
    replaced: ClassVar[int] = 0
    """How often a weight was put in place, in any layer: whoever keeps what follows from weights looks at it."""

    def __init__(self, name: str, weight: Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.name = name
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.adapters = nn.ModuleDict()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            Linear.replaced += 1
        super().__setattr__(name, value)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.weight.shape

    def adapter(self, adapter_id: int) -> Adapter | None:
        """The adapter of that id on this layer, or None."""
        found: Adapter | None = self.adapters._modules.get(str(adapter_id))  # type: ignore[assignment]
        return found

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """x [T, in] to [T, out]; `routes` says which rows are under which adapter."""
        if not self.adapters:
            return self._base(x)
        if routes.single is not None:
            return self._under(routes.single, x)
        return self._mixed(x, routes)

    def _base(self, x: Tensor) -> Tensor:
        y = self.weight.matmul(x)
        return y if self.bias is None else y + self.bias

    def _under(self, adapter_id: int, x: Tensor) -> Tensor:
        """All rows under one adapter."""
        adapter = self.adapter(adapter_id)
        if adapter is None:
            return self._base(x)
        y = adapter.forward(x, self.weight)
        bias = self.bias if adapter.bias is None else adapter.bias
        return y if bias is None else y + bias

    def _mixed(self, x: Tensor, routes: Routes) -> Tensor:
        """Rows under several adapters: one matmul of the base, and each adapter's part on its rows."""
        found = [(adapter_id, self.adapter(adapter_id)) for adapter_id, _ in routes.parts]
        loras: dict[int, tuple[Tensor, Tensor, float]] = {}
        for adapter_id, adapter in found:
            lora = None if adapter is None or adapter.bias is not None else adapter.as_lora()
            if lora is not None:
                loras[adapter_id] = lora
        if any(adapter is not None and adapter_id not in loras for adapter_id, adapter in found):
            parts = [self._under(adapter_id, x[rows]) for adapter_id, rows in routes.parts]
            return torch.cat(parts).index_select(0, routes.back.to(x.device))
        return lora_rows(self._base(x), x, loras, routes)  # nothing else refers to a matmul's fresh output


def together(layers: Sequence[Linear], x: Tensor, routes: Routes, origin: Origin | None = None) -> tuple[Tensor, ...]:
    """What each of the layers makes of the same x [T, in]; in training, LoRAs of one adapter in one operation.

    `origin` is x's, where it may be made again in the backward pass instead of being kept.
    """
    found = [] if routes.single is None else [layer.adapter(routes.single) for layer in layers]
    loras = [None if adapter is None or adapter.bias is not None else adapter.as_lora() for adapter in found]
    # a matrix that is made anew for each use has its own way forward
    lows = [(a, b, scale) for a, b, scale in filter(None, loras) if a.is_leaf and a.dtype in (x.dtype, torch.float32)]
    if not torch.is_grad_enabled() or len(lows) < len(layers):
        return tuple(layer(x, routes) for layer in layers)
    outputs = lora_linears(x, [layer.weight for layer in layers], lows, origin)
    return tuple(y if layer.bias is None else y + layer.bias for layer, y in zip(layers, outputs, strict=True))
