"""What training needs only now and then, in a file on disk instead of in memory. The numbers are the same to the bit.

- An optimizer's state: each tensor is mapped from the file, so that updates and checkpoints use it like any other.
  After a parameter's update its pages are given back: they are the file's from then on, which the system writes out and
  forgets when it needs the room, and reads again for the next update.
- The inputs of recomputed layers, which are all that waits for the backward pass: each is written when its layer has
  it, and read again when the layer is recomputed.

A file has no name: a process that ends in whatever way leaves nothing behind. What a run goes on from is in its
checkpoints, as ever.
"""

import contextlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftkit.errors import InputError
from ftkit.plan.budget import written

LEAST_BYTES = 1 << 16
"""Smaller tensors stay in memory: a mapping costs more than they do."""


_MAPPING_BYTES = 1 << 26
"""Of a mapping, in which tensors lie one after another: each keeps a descriptor open, of which a process has few."""


class Shelf:
    """A file below `folder` for the state of parameters by name. Raises InputError where the disk has no room."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, _without_name(folder)
        self._start = self._end = 0  # of the last mapping, and of the tensors in it
        self._mapping: mmap.mmap | None = None
        self._held: dict[str, list[tuple[mmap.mmap, int, int]]] = {}  # (mapping, place in it, bytes) by name

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the same values, in the file."""
        if not lies_on_disk(tensor):
            return tensor
        size = -(-tensor.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        file = self._file.fileno()
        with _room_for(size, self._folder):
            if self._mapping is None or self._end + size > self._start + len(self._mapping):
                length, self._start = max(size, _MAPPING_BYTES), self._end
                os.ftruncate(file, self._start + length)
                self._mapping = mmap.mmap(file, length, offset=self._start)
            _reserve(file, self._end, size)
        place = self._end - self._start
        self._end += size
        held = torch.frombuffer(self._mapping, dtype=tensor.dtype, count=tensor.numel(), offset=place)
        held = held.view(tensor.shape)
        held.copy_(tensor)
        self._held.setdefault(name, []).append((self._mapping, place, size))
        self.rest(name)
        return held

    def rest(self, name: str) -> None:
        """Gives the memory of a parameter's state back, until it is used again."""
        for mapping, place, size in self._held.get(name, ()):
            mapping.madvise(mmap.MADV_DONTNEED, place, size)  # of a shared mapping: the file keeps what was written


@dataclass(frozen=True, eq=False)
class _Written:
    """A tensor that waits in a file. Its room is free again when this is forgotten."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


class ActivationFile:
    """A file below `folder` for tensors between the forward and the backward pass. Raises InputError where the disk has
    no room.

    Without a folder nothing is written, and what is read has no values: for plans.
    """

    def __init__(self, folder: Path | None) -> None:
        self.written_bytes = 0
        """Of all tensors so far."""
        self._folder = folder
        self._file = None if folder is None else _without_name(folder)
        self._size = 0
        self._ends: set[int] = set()  # of the tensors that wait

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context: what autograd saves inside it is here until it is needed."""
        return torch.autograd.graph.saved_tensors_hooks(self.write, self.read)

    def write(self, tensor: Tensor) -> Tensor | _Written:
        """Takes the tensor's values, if it is not too small; what `read` gives them back for."""
        if not lies_on_disk(tensor):
            return tensor
        start = max(self._ends, default=0)  # a backward pass reads the last one first
        end = start + tensor.nbytes
        if self._file is not None and self._folder is not None:
            with _room_for(tensor.nbytes, self._folder):
                if end > self._size:
                    _reserve(self._file.fileno(), self._size, end - self._size)
                    self._size = end
                self._file.seek(start)
                self._file.write(_bytes_of(tensor))
                self._file.flush()
        self.written_bytes += tensor.nbytes
        held = _Written(start, tensor.shape, tensor.dtype)
        self._ends.add(end)
        weakref.finalize(held, self._ends.discard, end)
        return held

    def read(self, held: Tensor | _Written) -> Tensor:
        """The values that `write` took, in a tensor of their own."""
        if isinstance(held, Tensor):
            return held
        tensor = torch.empty(held.shape, dtype=held.dtype)
        if self._file is not None:
            self._file.seek(held.start)
            self._file.readinto(_bytes_of(tensor))
        return tensor


def _without_name(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def _bytes_of(tensor: Tensor) -> Any:
    """A buffer over the tensor's values."""
    return tensor.detach().contiguous().view(torch.uint8).numpy()


@contextlib.contextmanager
def _room_for(size: int, folder: Path) -> Iterator[None]:
    """Says it where the disk has no room for what is written inside."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"training.offload: expected room for {written(size)} more in {folder}, got: {error.strerror}",
            "FTKIT_CACHE names another folder for it",
        ) from None


def _reserve(file: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # else a full disk is met at the first write
        os.posix_fallocate(file, start, size)


def lies_on_disk(tensor: Tensor) -> bool:
    """Whether a tensor is large enough to be taken out of memory."""
    return tensor.nbytes >= LEAST_BYTES
