"""Layers whose parameters are a table or a vector, and may be trained whole: embedding and norm.

An adapter on them is a replacement of their weight, for the rows that it is routed to.
"""

import functools
from typing import Protocol

import torch
from torch import Tensor, nn

from ftkit.kernels.lora_linears import Origin
from ftkit.kernels.rms_norm import rms_norm
from ftkit.nn.linear import Weight
from ftkit.nn.routes import Routes


class Replacement(Protocol):
    """A weight that stands in for a layer's own."""

    @property
    def dense(self) -> Tensor:
        """The weight, in the dtype that the model computes in."""


class Embedding(nn.Module):
    """Token ids to the rows of a table [vocabulary, d]."""

    weight: Weight

    def __init__(self, name: str, weight: Weight) -> None:
        super().__init__()
        self.name = name
        self.weight = weight
        self.adapters = nn.ModuleDict()

    def forward(self, tokens: Tensor, routes: Routes) -> Tensor:
        """i32 [T] to [T, d]."""
        if not self.adapters:
            return self.weight.rows(tokens)
        rows = [self._rows(tokens[part], adapter) for adapter, part in routes.parts]
        return rows[0] if len(rows) == 1 else _in_order(rows, routes, tokens.device)

    def _rows(self, tokens: Tensor, adapter: int) -> Tensor:
        found: Replacement | None = self.adapters._modules.get(str(adapter))  # type: ignore[assignment]
        return self.weight.rows(tokens) if found is None else nn.functional.embedding(tokens, found.dense)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight [d]."""

    def __init__(self, name: str, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.epsilon = epsilon
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, routes: Routes) -> Tensor:
        """[T, ..., d] to the same shape."""
        if not self.adapters:
            return rms_norm(x, self.weight, self.epsilon)
        rows = [rms_norm(x[part], self._weight(adapter), self.epsilon) for adapter, part in routes.parts]
        return rows[0] if len(rows) == 1 else _in_order(rows, routes, x.device)

    def origin(self, x: Tensor) -> Origin | None:
        """Of `forward(x)`; None where an adapter is on the norm."""
        return None if self.adapters else Origin(functools.partial(rms_norm, epsilon=self.epsilon), (x, self.weight))

    def _weight(self, adapter: int) -> Tensor:
        found: Replacement | None = self.adapters._modules.get(str(adapter))  # type: ignore[assignment]
        return self.weight if found is None else found.dense


def _in_order(rows: list[Tensor], routes: Routes, device: torch.device) -> Tensor:
    """The parts of the routes as one stream again."""
    return torch.cat(rows).index_select(0, routes.back.to(device))
