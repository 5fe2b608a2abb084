"""The core's operations of a training step, as torch's: they write into tensors that the caller made."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftkit import _core

Tensors = list[Tensor]
Maybe = list[Tensor | None]
Frozen = _core.CodedMatrix | tuple[str, Tensor]
"""A matrix as the core multiplies with it: of codes, or (format, blocks uint8 [out, bytes of a row])."""
NUMBERS = (torch.float32, torch.bfloat16)
"""What the core reads and writes; it computes in float32, and rounds once."""

_library = torch.library.Library("ftkit", "FRAGMENT")
_LAYERS = "Tensor x, Tensor[] a, Tensor[] b, float[] scales"
_HEADS = "int[] lengths, int[] shared, float scale, int window"


def takes(*tensors: Tensor) -> bool:
    """Whether the core computes with these: all float32 or all bfloat16, on the CPU."""
    dtype = tensors[0].dtype
    return dtype in NUMBERS and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)


def gradient_dtype(dy: Tensor, cells: int) -> torch.dtype:
    """What dy W is summed up in, W of so many values: for bfloat16 that itself only where all of W is multiplied at
    once."""
    return dy.dtype if cells <= AT_ONCE else torch.float32


AT_ONCE = 1 << 21
"""Values of W that the core makes to tiles of bfloat16 at once."""


def _lora_forward(x: Tensor, a: Tensors, b: Tensors, scales: list[float], y: Tensors, low: Tensors) -> None:
    _core.lora_forward(x, a, b, scales, y, low)


def _lora_backward(
    x: Tensor,
    a: Tensors,
    b: Tensors,
    scales: list[float],
    dy: Tensors,
    low: Tensors,
    dlow: Tensors,
    da: Tensors,
    db: Tensors,
    dx: Tensor | None,
) -> None:
    none: Maybe = [None] * len(a)
    _core.lora_backward(x, a, b, scales, dy, low, dlow, da or none, db or none, dx)


_frozen: dict[int, Callable[[], Sequence[Frozen]]] = {}


def with_frozen(function: Callable[..., None], frozen: Callable[[], Sequence[Frozen]], *arguments: Any) -> None:
    """Calls one of the operations that multiply with frozen matrices, whatever these are: torch passes tensors alone.
    Where nothing is computed, as in a plan, nobody asks for the matrices."""
    key = id(frozen)
    _frozen[key] = frozen
    try:
        function(key, *arguments)
    finally:
        del _frozen[key]


def _low_rank_forward(
    frozen: int, x: Tensor, a: Tensors, b: Tensors, scales: list[float], y: Tensors, low: Tensors
) -> None:
    _core.low_rank_forward(x, _frozen[frozen](), a, b, scales, y, low)


def _low_rank_backward(
    frozen: int,
    x: Tensor,
    a: Tensors,
    b: Tensors,
    scales: list[float],
    dy: Tensors,
    low: Tensors,
    da: Tensors,
    db: Tensors,
    dx: Tensor | None,
) -> None:
    none: Maybe = [None] * len(a)
    _core.low_rank_backward(x, _frozen[frozen](), a, b, scales, dy, low, da or none, db or none, dx)


def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    shared: list[int],
    scale: float,
    window: int,
    y: Tensor,
    m: Tensor,
) -> None:
    _core.attention_forward(q, k, v, lengths, shared, scale, window or None, y, m)


def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    shared: list[int],
    scale: float,
    window: int,
    y: Tensor,
    m: Tensor,
    dy: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    _core.attention_backward(q, k, v, lengths, shared, scale, window or None, y, m, dy, dq, dk, dv)


def _define(name: str, arguments: str, function: object) -> None:
    _library.define(f"{name}({arguments}) -> ()")
    _library.impl(name, function, "CPU")
    torch.library.register_fake(f"ftkit::{name}", lambda *_: None, lib=_library)


_define("lora_forward", f"{_LAYERS}, Tensor(a!)[] y, Tensor(b!)[] low", _lora_forward)
_define(
    "lora_backward",
    f"{_LAYERS}, Tensor[] dy, Tensor[] low, Tensor(a!)[] dlow, Tensor(b!)[] da, Tensor(c!)[] db, Tensor(d!)? dx",
    _lora_backward,
)
_define("low_rank_forward", f"int frozen, {_LAYERS}, Tensor(a!)[] y, Tensor(b!)[] low", _low_rank_forward)
_define(
    "low_rank_backward",
    f"int frozen, {_LAYERS}, Tensor[] dy, Tensor[] low, Tensor(a!)[] da, Tensor(b!)[] db, Tensor(c!)? dx",
    _low_rank_backward,
)
_define("attention_forward", f"Tensor q, Tensor k, Tensor v, {_HEADS}, Tensor(a!) y, Tensor(b!) m", _attention_forward)
_define(
    "attention_backward",
    f"Tensor q, Tensor k, Tensor v, {_HEADS}, Tensor y, Tensor m, "
    "Tensor dy, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv",
    _attention_backward,
)
_define(
    "rms_norm_forward",
    "Tensor x, Tensor weight, float epsilon, Tensor(a!) y, Tensor(b!) roots",
    _core.rms_norm_forward,
)
_define(
    "rms_norm_backward",
    "Tensor dy, Tensor x, Tensor weight, Tensor roots, Tensor(a!) dx",
    _core.rms_norm_backward,
)
_define("swiglu_forward", "Tensor gate, Tensor up, Tensor(a!) y", _core.swiglu_forward)
_define(
    "swiglu_backward",
    "Tensor dy, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup",
    _core.swiglu_backward,
)
_define(
    "cross_entropy",
    "Tensor z, Tensor targets, Tensor(a!) losses, Tensor(b!)? slopes",
    _core.cross_entropy,
)
_define("rotate", "Tensor x, Tensor cos, Tensor sin, bool back, Tensor(a!) y", _core.rotate)

lora_forward, lora_backward = torch.ops.ftkit.lora_forward, torch.ops.ftkit.lora_backward
low_rank_forward, low_rank_backward = torch.ops.ftkit.low_rank_forward, torch.ops.ftkit.low_rank_backward
attention_forward, attention_backward = torch.ops.ftkit.attention_forward, torch.ops.ftkit.attention_backward
