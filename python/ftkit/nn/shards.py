"""Tensors of which each process of a group has a part, and files of whole ones, one of which is in memory at a time.

Where several processes train one model, torch's FSDP2 leaves each with some rows of every weight and gradient (a
`DTensor`). What works on entries alone takes the part (`local`); what needs them all gathers the whole (`Whole`), which
every process has to ask for.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Of types in a file of safetensors, in the order of its tensors, which is the other way round."""


def local(tensor: Any) -> Tensor:
    """This process' rows of a tensor, as they lie in memory; the tensor itself where it isn't shared out."""
    part: Tensor = tensor.to_local() if is_shared_out(tensor) else tensor
    return part


def is_shared_out(tensor: Tensor) -> bool:
    """Whether each process has a part of the tensor."""
    return hasattr(tensor, "to_local")  # asking for the class would import all of torch's distributed tensors


def rows_of(rows: int, rank: int, size: int) -> slice:
    """The rows that a process has of so many: as torch shares them out, the last processes have fewer, or none."""
    each = -(-rows // size)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))


def fill(tensor: Any, whole: Tensor) -> None:
    """Copies a whole tensor's values, or this process' rows of them."""
    if is_shared_out(tensor):
        mesh = tensor.device_mesh
        whole = whole[rows_of(len(whole), mesh.get_local_rank(), mesh.size())]
    local(tensor).copy_(whole)


@dataclass(frozen=True)
class Whole:
    """A tensor that is put together when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    gather: Callable[[], Tensor]
    """The tensor; every process of the group has to call it, in the same order."""

    @classmethod
    def of(cls, tensor: Any) -> "Whole":
        """A tensor that is here, or shared out."""
        gather: Any = tensor.full_tensor if is_shared_out(tensor) else lambda: tensor
        return cls(tuple(tensor.shape), tensor.dtype, gather)


def write(path: Path | None, tensors: Mapping[str, Whole], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file of safetensors, with the bytes that `safetensors.torch.save_file` writes; without a path it takes
    part in gathering them."""
    order = list(_NAMES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        one = tensors[name]
        start, end = end, end + one.dtype.itemsize * math.prod(one.shape)
        table[name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    file = None if path is None else path.open("wb")
    try:
        if file is not None:
            file.write(struct.pack("<Q", len(header)) + header)
        for name in names:
            values = tensors[name].gather()
            if file is not None:
                file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    finally:
        if file is not None:
            file.close()
