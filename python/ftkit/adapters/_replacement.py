"""A layer's own parameters, trained whole: what full finetuning does everywhere, and LoRA to extra modules."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ftkit.nn.linear import Linear, Weight
from ftkit.nn.tables import Embedding, RMSNorm

Layer = Linear | Embedding | RMSNorm


class Replacement(nn.Module):
    """A weight, and a bias where the layer has one, in place of the layer's own."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    @property
    def dense(self) -> Tensor:
        """The weight."""
        return self.weight

    def forward(self, x: Tensor, weight: Weight) -> Tensor:  # noqa: ARG002
        """A linear layer's x [rows, in] to [rows, out], without bias."""
        return functional.linear(x, self.weight)

    def merged(self, weight: Weight) -> Tensor:  # noqa: ARG002
        """The weight."""
        return self.weight.detach()

    def merged_weight(self, weight: Weight) -> Weight | None:  # noqa: ARG002
        """None: it is dense."""
        return None

    def as_lora(self) -> tuple[Tensor, Tensor, float] | None:
        """Never: the difference has any rank."""
        return None


def replace(layers: dict[str, Layer], names: list[str], adapter_id: int, tied: bool, share: bool) -> None:
    """Puts replacements on the named layers that start as what they replace.

    `tied`: a head with the embedding's weight stays so, and both train when one is named. `share`: the replacement is
    the base weight's own memory, and the base changes with it.
    """
    embedding, head = layers["model.embed_tokens"], layers["lm_head"]
    if tied and embedding.weight is head.weight and {embedding.name, head.name} & set(names):
        names = [name for name in names if name != head.name]
        names += [embedding.name] * (embedding.name not in names)
    else:
        tied = False
    for name in names:
        layer = layers[name]
        replacement = Replacement(_parameter(_dense(layer), share))
        if isinstance(layer, Linear) and layer.bias is not None:
            replacement.bias = _parameter(layer.bias, share)
        layer.adapters[str(adapter_id)] = replacement
        if tied and layer is embedding:
            head.adapters[str(adapter_id)] = Replacement(replacement.weight)


def _dense(layer: Layer) -> Tensor:
    return layer.weight if isinstance(layer.weight, Tensor) else layer.weight.dense()


def _parameter(tensor: Tensor, share: bool) -> nn.Parameter:
    values = tensor.detach()
    return nn.Parameter(values if share else values.clone(memory_format=torch.contiguous_format))
