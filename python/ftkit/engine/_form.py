"""What LoRAs of one shape have in common, so that it is worked out once for all of them.

    (adapter_config.json, ftkit.json, the beginning of the weights) → settings, layers, places in the file and in pages

Adapters that were trained alike differ in nothing but their numbers. The first of them is read as any adapter is, with
all that is checked there; those that follow are brought from their files to pages by the core, without Python's lock,
and what is left to check is that the numbers are all there and finite.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftkit import _core, adapters
from ftkit.kernels.lora_linear import lora_linear
from ftkit.nn.linear import Weight

KEPT = 64
"""Forms that are remembered: as many shapes of adapters come and go without being worked out anew."""

FLOATS = ("F32", "F16", "BF16")
"""Numbers of files that the core brings to pages."""


class LowRank(nn.Module):
    """A LoRA whose matrices are somebody else's memory; for computing only."""

    bias: Tensor | None = None

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = a, b, scale

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] to [rows, out]."""
        return lora_linear(x, weight, self.a, self.b, self.scale)

    def merged(self, weight: Weight) -> Tensor:
        """W + s B A, in W's dtype."""
        dense = weight.dense()
        return (dense.to(self.a.dtype) + self.scale * (self.b @ self.a)).to(dense.dtype)

    def merged_weight(self, weight: Weight) -> Weight | None:  # noqa: ARG002
        """None: W's codes cannot hold it."""
        return None

    def as_lora(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s."""
        return self.a, self.b, self.scale


@dataclass(frozen=True)
class Form:
    """The form of some adapters."""

    attached: adapters.Attached
    layers: tuple[str, ...]
    """The names of the layers that they change, in the order of `core.pairs`."""
    core: _core.LoraForm

    def modules(self, pool: Tensor, pages: list[int]) -> Iterator[tuple[str, LowRank]]:
        """Each layer's name, and its part of an adapter in these pages of a pool."""

        def matrix(place: tuple[int, int], rows: int, columns: int) -> Tensor:
            page, at = place
            return pool[pages[page]][at : at + rows * columns * 4].view(torch.float32).view(rows, columns)

        for name, (_, (out, inputs), rank, scale, a, b) in zip(self.layers, self.core.pairs, strict=True):
            yield name, LowRank(matrix(a, rank, inputs), matrix(b, rank, out).t(), scale)


class Forms:
    """The forms of the adapters that were read last."""

    def __init__(self, linears: Mapping[str, Any], page_bytes: int) -> None:
        """`linears`: a model's linear layers, in the order of the forward pass, the head last."""
        self._numbers = {name: number for number, name in enumerate(linears)}
        self._page_bytes = page_bytes
        self._known: dict[tuple[bytes, bytes, bytes], Form] = {}

    def find(self, files: adapters.Snapshot) -> Form | None:
        """The form of an adapter whose like was read before."""
        form = self._known.pop(_key(files), None)
        if form is not None:
            self._known[_key(files)] = form  # the last to be forgotten
        return form

    def learn(
        self, files: adapters.Snapshot, attached: adapters.Attached, modules: Mapping[str, nn.Module]
    ) -> Form | None:
        """The form of an adapter that was read from these files as `adapters.read` does; None where it is no LoRA whose
        matrices the file has as they are, each in a page."""
        keys = adapters.file_keys(attached, modules)
        table = json.loads(files.head[8:])
        start = len(files.head)

        def source(matrix: Tensor) -> tuple[str, int] | None:
            entry = table.get(keys.get(id(matrix)))
            return (
                None
                if entry is None or entry["dtype"] not in FLOATS
                else (entry["dtype"], start + entry["data_offsets"][0])
            )

        pairs = []
        for name, module in modules.items():
            lora = _lora(module)
            if lora is None or name not in self._numbers:
                return None
            a, b = source(lora[0]), source(lora[1])
            if a is None or b is None:
                return None
            rank, inputs = lora[0].shape
            pairs.append((self._numbers[name], (lora[1].shape[0], inputs), rank, lora[2], a, b))
        core = _core.LoraForm.of(pairs, self._page_bytes)
        if core is None:
            return None
        form = self._known[_key(files)] = Form(attached, tuple(modules), core)
        if len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return form


def _key(files: adapters.Snapshot) -> tuple[bytes, bytes, bytes]:
    return files.config, files.record, files.head


def _lora(module: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and s of what is a LoRA and nothing besides."""
    if not hasattr(module, "as_lora") or module.bias is not None:
        return None
    found: tuple[Tensor, Tensor, float] | None = module.as_lora()
    return found
