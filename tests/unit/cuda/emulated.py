"""Kernels launched in the emulator, as the driver launches them on a GPU; a fault fails the test."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from ftkit.cuda.arguments import check
from ftkit.cuda.compiler import available, compile_variant
from ftkit.cuda.launches import Argument, Launch
from ftkit.cuda.on_cpu import Library, Traffic, build
from ftkit.cuda.on_cpu.ptx import kernels_of, run
from ftkit.cuda.source import Variant, variant
from ftkit.kernels.coded_matmul import Coded, coded_dense
from ftkit.plugins import load

# Macros of what codes are, and the tensor core's kernels that take any.
NF4: dict[str, object] = {"SCALE": "uint8_t", "GROUP": 64, "OFFSETS": 0}
INT4: list[dict[str, object]] = [{"SCALE": "half", "GROUP": group, "OFFSETS": 1} for group in (32, 64, 128)]
TILED = ("coded_decode", "coded_forward", "coded_dx")
# What tests launch; compiled in one go. Others are compiled when they are launched.
VARIANTS = [
    variant("dequant_coded", TABLE=16, SCALE="uint8_t", OFFSETS=0, OUT="float"),
    variant("dequant_coded", TABLE=16, SCALE="uint8_t", OFFSETS=0, OUT="bf16"),
    variant("dequant_coded", TABLE=16, SCALE="float", OFFSETS=0, OUT="half"),
    variant("dequant_coded", TABLE=16, SCALE="half", OFFSETS=1, OUT="float"),
    variant("dequant_coded", TABLE=0, SCALE="float", OFFSETS=0, OUT="float"),
    *(variant("dequant_blocks", FORMAT=kind, OUT="float") for kind in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")),
    *(variant("coded_gemv", ROWS=m, VALUE="bf16", **NF4) for m in (1, 2, 3, 4)),
    variant("coded_gemv", ROWS=2, VALUE="float", **INT4[0]),
    *(variant(name, **macros) for name in TILED for macros in (NF4, NF4 | {"SCALE": "float"}, *INT4)),
    *(variant(name, VALUE=kind) for name in ("rms_norm", "swiglu", "rope") for kind in ("bf16", "float")),
    *(
        variant("cross_entropy", VALUE=kind, GRADIENT=gradient)
        for kind, gradient in (("bf16", 1), ("float", 1), ("half", 0))
    ),
    variant("adamw_8bit"),
    *(variant("paged_attention", VALUE=kind, HEAD=size) for kind, size in (("bf16", 64), ("float", 128))),
    *(variant("lora_bgmv", VALUE=kind, WEIGHT="float") for kind in ("bf16", "float")),
    variant("lora_sgmv", WEIGHT="float"),
    variant("lora_gradient"),
    *(variant("paged_prefill", HEAD=size) for size in (64, 80, 96, 128)),
    *(variant("attention", HEAD=size) for size in (64, 128)),
]


# The variant of each source that budgets are of.
DEAREST = {
    one.name: one
    for one in (
        variant("dequant_coded", TABLE=16, SCALE="uint8_t", OFFSETS=0, OUT="bf16"),
        variant("dequant_blocks", FORMAT="Q4_K", OUT="float"),
        variant("coded_gemv", ROWS=4, VALUE="bf16", **NF4),
        *(variant(name, **NF4) for name in TILED),
        *(variant(name, VALUE="bf16") for name in ("rms_norm", "swiglu", "rope")),
        variant("cross_entropy", VALUE="bf16", GRADIENT=1),
        variant("adamw_8bit"),
        variant("paged_attention", VALUE="bf16", HEAD=64),
        variant("lora_bgmv", VALUE="bf16", WEIGHT="float"),
        variant("lora_sgmv", WEIGHT="float"),
        variant("lora_gradient"),
        variant("paged_prefill", HEAD=128),
        variant("attention", HEAD=128),
    )
}


needs_nvrtc = pytest.mark.skipif(not available(), reason="needs NVRTC, which torch's CUDA wheel brings")


class Kit(Protocol):
    """A way to run kernels."""

    def launcher(self, schedule: int = 0) -> Launch:
        """What launches by this schedule of the emulator's."""


class Emulated:
    """Kernels in the emulator, those of `libraries` compiled before."""

    def __init__(self, libraries: dict[Variant, Library], noted: list[Variant] | None = None) -> None:
        """`noted`, if given, is told of each launch's variant."""
        self.libraries, self.noted = libraries, noted

    def launcher(self, schedule: int = 0, traffic: list[Traffic] | None = None) -> Launch:
        """Launches by this schedule; what memory did is added to `traffic`."""

        def launch(variant: Variant, name: str, grid: Sequence[int], arguments: Sequence[Argument], /) -> None:
            if variant not in self.libraries:
                (self.libraries[variant],) = build([variant])
            if self.noted is not None:
                self.noted.append(variant)
            poison(variant, name, arguments)
            library = self.libraries[variant]
            counts = traffic is not None
            report = library.launch(name, grid, arguments, schedule=schedule, seed=schedule, traffic=counts)
            if traffic is not None:
                traffic.extend(report.traffic)
            assert not report.faults, "\n".join(map(str, report.faults))

        return launch


class Interpreted:
    """Kernels as PTX, which NVRTC makes and the interpreter executes; `changed` are files that are others."""

    def __init__(self, changed: tuple[tuple[str, str], ...] = ()) -> None:
        self.changed = changed

    def launcher(self, _schedule: int = 0) -> Launch:
        def launch(variant: Variant, name: str, grid: Sequence[int], arguments: Sequence[Argument], /) -> None:
            check(variant.kernels()[name], arguments, "cpu")
            poison(variant, name, arguments)
            variant = dataclasses.replace(variant, changed=self.changed)
            run(_ptx(variant)[name], grid, variant.kernels()[name].threads, arguments)

        return launch


@functools.cache
def _ptx(variant: Variant) -> dict[str, Any]:
    return kernels_of(compile_variant(variant, "sm_80").ptx)


def poison(variant: Variant, name: str, arguments: Sequence[Argument]) -> None:
    """Fills outputs (what is written and was only just made) with NaN, so that what isn't written shows."""
    for parameter, argument in zip(variant.kernels()[name].parameters, arguments, strict=True):
        written = isinstance(argument, Tensor) and not parameter.constant and argument.is_floating_point()
        if written and parameter.name in OUTPUTS:
            argument.fill_(torch.nan)


OUTPUTS = {
    "out",
    "y",
    "m",
    "along",
    "dq",
    "dk",
    "dv",
    "low",
    "dx",
    "dgate",
    "dup",
    "dweight",
    "losses",
    "gradient",
    "scales",
}


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coded_matrix(scheme: str, rows: int, columns: int, seed: int = 0) -> Coded:
    """A random matrix, quantized by a scheme of ftkit's."""
    name, _, option = scheme.partition(":")
    made = load("quant", name).scheme(option)
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    return made.coded(made.encode(dense), (rows, columns))


def exact(coded: Coded, dtype: torch.dtype) -> Tensor:
    """W as kernels for this dtype have it, in float64."""
    return coded_dense.reference(coded).to(dtype).double()


def close(found: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Fails unless each number is right up to its type's rounding and float32's of sums of this magnitude."""
    bound = expected.abs() * torch.finfo(found.dtype).eps + magnitude * 2e-6 + 1e-12
    wrong = ~((found.double() - expected).abs() <= bound)  # NaN is wrong
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} numbers, the first at {wrong.nonzero()[0].tolist()}"
