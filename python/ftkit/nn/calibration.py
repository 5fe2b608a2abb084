"""Calibration: what goes into each linear layer while a model reads texts.

    mean = 1/n Σ x        second moment = 1/n Σ x²        over the n tokens read, for each column of the layer's matrix

One pass serves whoever needs to know a layer's inputs, and hands it to them. The inputs are those of the live model:
under the adapters that the batches name, over whatever its matrices are held in. There is no padding that could count.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import Linear


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Of what went into a layer."""

    tokens: int
    mean: Tensor
    """float64 [in]"""
    second_moment: Tensor
    """float64 [in]: the mean of the squares."""


def input_statistics(
    model: Decoder,
    batches: Iterable[RaggedBatch],
    progress: Callable[[int], None] = lambda tokens: None,  # noqa: ARG005
) -> dict[str, InputStatistics]:
    """The statistics of every linear layer by its published name, the head's included; empty when there is no token.

    Sums are in float64. `progress` is called with the number of tokens read so far.
    """
    sums: dict[str, _Sums] = {}
    latest: tuple[Tensor, _Sums] | None = None

    def note(name: str, x: Tensor) -> None:
        nonlocal latest
        if latest is None or latest[0] is not x:  # queries, keys and values have one input; so have gate and up
            latest = x, _Sums.of(x)
        sums[name] = sums[name] + latest[1] if name in sums else latest[1]

    def before(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Linear)
        note(layer.name, inputs[0])

    head = model.lm_head.name
    hooks = [layer.register_forward_pre_hook(before) for name, layer in model.linears().items() if name != head]
    tokens = 0
    try:
        with torch.inference_mode():
            for batch in batches:
                note(head, model(batch))  # the head itself, the dearest product, need not run
                tokens += len(batch.tokens)
                progress(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums[name].statistics() for name in model.linears() if name in sums}


@dataclass(frozen=True)
class _Sums:
    """Over the tokens read so far."""

    tokens: int
    values: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "_Sums":
        wide = x.double()  # [T, in]
        return cls(len(x), wide.sum(0), wide.square().sum(0))

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(self.tokens + other.tokens, self.values + other.values, self.squares + other.squares)

    def statistics(self) -> InputStatistics:
        return InputStatistics(
            tokens=self.tokens, mean=self.values / self.tokens, second_moment=self.squares / self.tokens
        )
