"""Global memory as PTX sees it: one row of bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftkit.errors import FtkitError

Array = np.ndarray[Any, np.dtype[Any]]
_GAP = 256


class Memory:
    """Global memory: tensors with gaps between them that nobody may touch."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self.places, end = tensors, [], _GAP
        for tensor in tensors:
            self.places.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _GAP) * _GAP + _GAP
        self.bytes, self._known = np.zeros(end, np.uint8), np.zeros(end, bool)
        for place, raw in zip(self.places, self._raw(), strict=True):
            self.bytes[place : place + len(raw)] = raw
            self._known[place : place + len(raw)] = True

    def _raw(self) -> list[Array]:
        return [tensor.view(-1).view(torch.uint8).numpy() for tensor in self._tensors]

    def write_back(self) -> None:
        """Puts what was stored into the tensors."""
        for place, raw in zip(self.places, self._raw(), strict=True):
            raw[:] = self.bytes[place : place + len(raw)]

    def check(self, places: Array, text: str) -> None:
        """Raises FtkitError unless all places are some tensor's."""
        if places.size and not (places.max() < len(self.bytes) and self._known[places].all()):
            raise FtkitError(f"out of bounds of global memory: {text}")
