"""An optimizer's state in a file on disk instead of in memory.

Each tensor is mapped from the file, so that updates and checkpoints use it like any other. After a parameter's update
its pages are given back: they are the file's from then on, which the system writes out and forgets when it needs the
room, and reads again for the next update. The numbers are the same to the bit.

The file has no name: a process that ends in whatever way leaves nothing behind. What a run goes on from is in its
checkpoints, as ever.
"""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ftkit.errors import InputError
from ftkit.plan.budget import written

LEAST_BYTES = 1 << 16
"""Smaller tensors stay in memory: a mapping costs more than they do."""


class Shelf:
    """A file below `folder` for the state of parameters by name. Raises InputError where the disk has no room."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, it lives as long as the state
        self._end = 0
        self._mapped: dict[str, list[mmap.mmap]] = {}

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the same values, in the file."""
        if not lies_on_disk(tensor):
            return tensor
        size = -(-tensor.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            _reserve(self._file.fileno(), self._end, size)
        except OSError as error:
            raise InputError(
                f"training.offload: expected room for {written(size)} more in {self._folder}, got: {error.strerror}",
                "FTKIT_CACHE names another folder for it",
            ) from None
        mapped = mmap.mmap(self._file.fileno(), size, offset=self._end)
        self._end += size
        held = torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        held.copy_(tensor)
        self._mapped.setdefault(name, []).append(mapped)
        self.rest(name)
        return held

    def rest(self, name: str) -> None:
        """Gives the memory of a parameter's state back, until it is used again."""
        for mapped in self._mapped.get(name, ()):
            mapped.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: the file keeps what was written


def _reserve(file: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # else a full disk is met at the first write
        os.posix_fallocate(file, start, size)
    else:
        os.ftruncate(file, start + size)


def lies_on_disk(tensor: Tensor) -> bool:
    """Whether a shelf takes the tensor out of memory."""
    return tensor.nbytes >= LEAST_BYTES
