"""AdamW with its state in 8 bits: a quarter of the memory, nearly the same path. For full finetuning.

As `adamw`; mean and square are kept as codes with a scale for each 256 entries (see `kernels/blockwise_adamw.py`), the
format and the rules of bitsandbytes' AdamW8bit. Tensors of fewer than 4,096 entries, such as norms and biases, keep
them in float32: they cost nothing, and are sensitive.

State: 2.03 bytes a parameter.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, arXiv 2110.02861.
"""

import torch
from torch import Tensor

from ftkit.kernels.blockwise_adamw import BLOCK, Blocks, Factors, blockwise_adamw, dynamic_map
from ftkit.optim import adamw
from ftkit.optim._optimizer import CHUNK, Moment, chunks

LEAST = 4096
"""Entries from which on a tensor is quantized, as in bitsandbytes."""


Config = adamw.Config


def rule(config: Config) -> "AdamW8bit":
    """The rule."""
    return AdamW8bit(config)


class AdamW8bit:
    """Codes and scales of large tensors, AdamW's state of small ones."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._small = adamw.rule(config)
        self._maps = {"mean": dynamic_map(signed=True), "square": dynamic_map(signed=False)}

    def state(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """`mean` and `square`, uint8 of the weight's shape, their `mean_scale` and `square_scale` [blocks]."""
        if weight.numel() < LEAST:
            return self._small.state(name, weight)
        found = {}
        for kind in self._maps:
            found[kind] = torch.zeros_like(weight, dtype=torch.uint8)
            found[f"{kind}_scale"] = weight.new_zeros(-(-weight.numel() // BLOCK), dtype=torch.float32)
        return found

    def elementwise(self, name: str, weight: Tensor) -> bool:  # noqa: ARG002
        """Where it isn't quantized: blocks don't end where rows do."""
        return weight.numel() < LEAST

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], moment: Moment) -> None:
        """See the equations of `adamw`."""
        if "mean_scale" not in state:
            self._small.update(weight, gradient, state, moment)
            return
        config = self._config
        factors = Factors(
            beta1=config.beta1,
            beta2=config.beta2,
            epsilon=config.epsilon,
            rate=moment.rate / (1 - config.beta1**moment.step),
            correction=(1 - config.beta2**moment.step) ** 0.5,
            kept=1 - moment.rate * config.weight_decay if moment.decays else 1.0,
        )
        maps = {kind: values.to(weight.device) for kind, values in self._maps.items()}
        for number, parts in enumerate(chunks(gradient, weight, state["mean"], state["square"])):
            part, values, *codes = parts
            blocks = slice(number * (CHUNK // BLOCK), (number + 1) * (CHUNK // BLOCK))
            mean, square = (
                Blocks(codes=each, greatest=state[f"{kind}_scale"][blocks], map=maps[kind])
                for kind, each in zip(maps, codes, strict=True)
            )
            blockwise_adamw(values, part, mean, square, factors)
