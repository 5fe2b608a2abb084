"""The CUDA kernels as operations of torch, with fake implementations, so that plans see what they allocate.

`fits` says whether a GPU's kernels may take tensors; each operation's file says for which arguments they do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ftkit.cuda import driver, launches
from ftkit.cuda.launches import Argument, Launch
from ftkit.cuda.source import Variant
from ftkit.kernels import allows, pinned

device_type = "cuda"
"""Of the tensors that kernels take; a plan, and tests with the emulator, put the CPU's in their place."""
runner: Launch = driver.launch


@contextmanager
def foreseen() -> Iterator[None]:
    """Inside, tensors of the CPU pass for a GPU's, and operations are its kernels' or torch's own: for plans."""
    global device_type
    before, device_type = device_type, "cpu"
    try:
        with pinned("cuda,fused,sdpa" if allows("cuda") else "fused,sdpa"):
            yield
    finally:
        device_type = before


_library = torch.library.Library("ftkit", "FRAGMENT")


def launch(variant: Variant, name: str, grid: Sequence[int], arguments: Sequence[Argument], /) -> None:
    """Runs a kernel where kernels run."""
    runner(variant, name, grid, arguments)


def fits(*tensors: Tensor) -> bool:
    """Whether all are on a GPU, contiguous, aligned and of the first one's dtype, one that kernels know."""
    first = tensors[0]
    known = first.dtype in (torch.float32, torch.bfloat16, torch.float16) and torch.version.hip is None
    return (
        known
        and launches.aligned(*tensors)
        and all(one.device.type == device_type and one.is_contiguous() and one.dtype == first.dtype for one in tensors)
    )


def define(signature: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `ftkit::NAME` by its signature, on CUDA and on fake tensors; returns what calls it."""
    name = signature.split("(")[0]
    _library.define(signature)
    implement(name, run)
    torch.library.register_fake(f"ftkit::{name}", fake, lib=_library)
    called: Callable[..., Any] = getattr(torch.ops.ftkit, name)
    return called


def implement(name: str, run: Callable[..., Any]) -> None:
    """Gives `ftkit::NAME`, which is defined elsewhere, its implementation on CUDA."""
    runs[name] = run
    _library.impl(name, run, "CUDA")


runs: dict[str, Callable[..., Any]] = {}
"""Operation → its implementation, whatever device the tensors are on."""


rms_norm = define(
    "gpu_rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    lambda x, weight, epsilon: launches.rms_norm(launch, x, weight, epsilon),
    lambda x, _weight, _epsilon: (torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)),
)
rms_norm_dx = define(
    "gpu_rms_norm_dx(Tensor dy, Tensor x, Tensor weight, Tensor scales) -> Tensor",
    lambda dy, x, weight, scales: launches.rms_norm_dx(launch, dy, x, weight, scales),
    lambda _dy, x, _weight, _scales: torch.empty_like(x),
)
rms_norm_dweight = define(
    "gpu_rms_norm_dweight(Tensor dy, Tensor x, Tensor scales) -> Tensor",
    lambda dy, x, scales: launches.rms_norm_dweight(launch, dy, x, scales),
    lambda _dy, x, _scales: x.new_empty(x.shape[1], dtype=torch.float32),
)
swiglu = define(
    "gpu_swiglu(Tensor gate, Tensor up) -> Tensor",
    lambda gate, up: launches.swiglu(launch, gate, up),
    lambda gate, _up: torch.empty_like(gate),
)
swiglu_backward = define(
    "gpu_swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda dy, gate, up: launches.swiglu_backward(launch, dy, gate, up),
    lambda _dy, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)
rope = define(
    "gpu_rope(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    lambda x, cos, sin, back: launches.rope(launch, x, cos, sin, back),
    lambda x, _cos, _sin, _back: torch.empty_like(x),
)
cross_entropy = define(
    "gpu_cross_entropy(Tensor logits, Tensor targets) -> (Tensor, Tensor)",
    lambda logits, targets: launches.cross_entropy(launch, logits, targets, True),
    lambda logits, _: (logits.new_empty(len(logits), dtype=torch.float32), torch.empty_like(logits)),
)
