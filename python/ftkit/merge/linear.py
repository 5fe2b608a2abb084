"""Weighted sum of what the adapters change: W = W₀ + Σᵢ wᵢ (Wᵢ − W₀).

With weights that sum to 1 this is the average of the finetuned models; with weights of 1 their changes are added up.
Source: Ilharco et al., Editing Models with Task Arithmetic, 2023, arXiv 2212.04089.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor


def merged(
    base: Mapping[str, Tensor], adapted: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The tensors that differ from the base's, summed in float32 at least."""
    found: dict[str, Tensor] = {}
    names = {name for tensors in adapted for name, tensor in tensors.items() if tensor is not base.get(name)}
    for name in sorted(names):
        start = base.get(name)
        total = None if start is None else start.detach().float()
        for tensors, weight in zip(adapted, weights, strict=True):
            if name in tensors:
                change = tensors[name].detach().float() - (0 if start is None else start.detach().float())
                total = weight * change if total is None else total + weight * change
        assert total is not None  # the name is in one of the adapters at least
        found[name] = total.to(next(tensors[name] for tensors in adapted if name in tensors).dtype)
    return found
