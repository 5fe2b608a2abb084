"""AdamW's update over a state of 8 bits: read from blocks, moved in float32, and rounded back into blocks.

    m = map[code] · greatest of the block               code = the map's nearest to m / greatest of the block

A map has its 256 values denser toward zero: seven decades below 1, each with twice the values of the one below, so
that small entries of a block keep a relative precision. Means have signs; squares have none, and twice the values.

A square above zero takes no code of zero, however small it is beside its block's greatest (in bitsandbytes it does):
the next step whose gradient is zero, such as that of a token that doesn't occur, would divide the mean by ε alone and
throw the weight far off.

Sources: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, arXiv 2110.02861; Dettmers, 8-Bit
Approximations for Parallelism in Deep Learning, 2016, arXiv 1511.04561.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ftkit import _core
from ftkit.cuda import launches
from ftkit.kernels import _gpu, operation

BLOCK = 256
"""Entries that share their greatest magnitude, as in bitsandbytes."""

DECADES = 7
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A flat state: `codes` uint8 [n] into `map` float32 [256] (rising), `greatest` float32 [⌈n / 256⌉]."""

    codes: Tensor
    greatest: Tensor
    map: Tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The numbers of one update."""

    beta1: float
    beta2: float
    epsilon: float
    rate: float
    """The learning rate over the mean's correction, η / (1 − β₁ᵗ)."""
    correction: float
    """That of the square's root, √(1 − β₂ᵗ)."""
    kept: float
    """What weight decay leaves of a weight, 1 − η λ."""


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values, rising, between −1 or 0 and 1: float32, the bits of bitsandbytes."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - DECADES)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def edges_of(map: Tensor) -> Tensor:
    """float32 [255]: a value takes the code of the first edge that it isn't beyond, 255 beyond all."""
    edges = (map[1:] + map[:-1]) / 2
    return torch.where((map == 0)[:-1] & (map[0] == 0), 0.0, edges)


@operation
def blockwise_adamw(weight: Tensor, gradient: Tensor, mean: Blocks, square: Blocks, factors: Factors) -> None:
    """Moves the weight and both states in place. weight and gradient: float32 [n], contiguous."""
    m = _read(mean).mul_(factors.beta1).add_(gradient, alpha=1 - factors.beta1)
    v = _read(square).mul_(factors.beta2).addcmul_(gradient, gradient, value=1 - factors.beta2)
    write(mean, m)
    denominator = v.sqrt().div_(factors.correction).add_(factors.epsilon)
    weight.mul_(factors.kept).addcdiv_(m, denominator, value=-factors.rate)
    write(square, v)


def _read(state: Blocks) -> Tensor:
    """float32 [n]"""
    values = functional.embedding(state.codes.int(), state.map.view(-1, 1)).view(-1)
    return values.mul_(state.greatest.repeat_interleave(BLOCK)[: len(values)])


def write(state: Blocks, values: Tensor) -> None:
    """Rounds float32 [n] to the nearest codes; halfway to the lower one."""
    blocks = functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    state.greatest.copy_(blocks.abs().amax(1))
    shares = blocks / state.greatest.clamp(min=_TINY).unsqueeze(1)  # a block of zeros stays one
    state.codes.copy_(torch.bucketize(shares, edges_of(state.map), out_int32=True).view(-1)[: len(values)])


@blockwise_adamw.backend(
    "cuda", lambda weight, gradient, *_: weight.dtype == torch.float32 and _gpu.fits(weight, gradient)
)
@blockwise_adamw.backend("cpu", lambda weight, *_: weight.device.type == "cpu")
def _core_or_kernel(weight: Tensor, gradient: Tensor, mean: Blocks, square: Blocks, factors: Factors) -> None:
    states = [
        each for state in (mean, square) for each in (state.codes, state.greatest, state.map, edges_of(state.map))
    ]
    torch.ops.ftkit.blockwise_adamw_(weight, gradient, *states, *dataclasses.astuple(factors))


_library = torch.library.Library("ftkit", "FRAGMENT")
_library.define(
    "blockwise_adamw_(Tensor(a!) weight, Tensor gradient, "
    "Tensor(b!) mean, Tensor(c!) mean_greatest, Tensor mean_map, Tensor mean_edges, "
    "Tensor(d!) square, Tensor(e!) square_greatest, Tensor square_map, Tensor square_edges, "
    "float beta1, float beta2, float epsilon, float rate, float correction, float kept) -> ()"
)


def _run(weight: Tensor, gradient: Tensor, *rest: Any) -> None:
    _core.blockwise_adamw(weight, gradient, rest[:4], rest[4:8], rest[8:])


def _launch(weight: Tensor, gradient: Tensor, *rest: Any) -> None:
    launches.adamw_8bit(_gpu.launch, weight, gradient, rest[:4], rest[4:8], rest[8:])


_gpu.implement("blockwise_adamw_", _launch)
_library.impl("blockwise_adamw_", _run, "CPU")
torch.library.register_fake("ftkit::blockwise_adamw_", lambda *_: None, lib=_library)
