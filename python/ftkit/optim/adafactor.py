"""Adafactor: a matrix' squared gradients as a row times a column, so that the state is next to nothing.

    β ← 1 − t^−d
    r ← β r + (1 − β) mean over columns of (g² + ε)      c ← β c + (1 − β) mean over rows of (g² + ε)
    u ← g / √(r cᵀ / mean(r))                            u ← u / max(1, RMS(u) / clip)
    w ← w − η λ w                                        w ← w − η u

State: 4 bytes a row and a column of a matrix; a vector keeps the average of its g². There is no mean of the gradient.
The rate means what AdamW's does, unless `scale_parameter` is set: then it is relative to the weight, η · max(10⁻³,
RMS(w)), as the paper has it. Matrices decay; vectors and embeddings do not.

Source: Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018, arXiv 1804.04235.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ftkit.config import option
from ftkit.optim._optimizer import CHUNK, Moment, zeros

LEAST_SCALE = 1e-3
"""What a weight's RMS counts for at least, so that zeros can move; the paper's ε₂."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Adafactor's settings."""

    learning_rate: float = option(2e-4, "the highest rate; 2e-4 suits LoRA, 1e-5 full finetuning", above=0)
    decay: float = option(0.8, "how fast the memory of the squares grows: 1 − step^−decay", above=0)
    epsilon: float = option(1e-30, "added to the squares", above=0)
    clip: float = option(1.0, "the RMS that an update may have, times the rate", above=0)
    scale_parameter: bool = option(False, "take the rate relative to the weight's RMS")
    weight_decay: float = option(0.0, "share of a matrix, times the rate, lost a step; 0 suits short runs", at_least=0)


def rule(config: Config) -> "Adafactor":
    """Adafactor's rule."""
    return Adafactor(config)


class Adafactor:
    """`row` and `column` of a matrix, `square` of a vector; a few rows at a time are ever computed."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def state(self, name: str, weight: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """`row` [rows] and `column` [columns], where leading sides count as rows; of a vector `square`."""
        if weight.ndim < 2:
            return {"square": zeros(weight)}
        return {
            "row": weight.new_zeros(weight.numel() // weight.shape[-1], dtype=torch.float32),
            "column": weight.new_zeros(weight.shape[-1], dtype=torch.float32),
        }

    def elementwise(self, name: str, weight: Tensor) -> bool:  # noqa: ARG002
        """Never: an update is measured as a whole."""
        return False

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], moment: Moment) -> None:
        """See the file's equations. A vector is a matrix of one column."""
        width = weight.shape[-1] if weight.ndim > 1 else 1
        values, gradients = weight.view(-1, width), gradient.reshape(-1, width)
        square = state.get("row", state.get("square"))
        assert square is not None
        square = square.view(-1, 1)
        column = self._remember(gradients, square, state.get("column"), moment.step)
        relative = square / square.mean() if column is not None else square

        def normalized(rows: slice) -> Tensor:
            update = gradients[rows].float() * relative[rows].rsqrt()
            return update if column is None else update.mul_(column.rsqrt())

        total = sum((normalized(rows).square_().sum() for rows in _pieces(gradients)), weight.new_zeros(()))
        excess = (total / weight.numel()).sqrt().div_(self._config.clip).clamp_(min=1)
        rate = torch.full_like(excess, moment.rate)
        if self._config.scale_parameter:
            rate *= (torch.linalg.vector_norm(weight) / weight.numel() ** 0.5).clamp_(min=LEAST_SCALE)
        if moment.decays and self._config.weight_decay:
            values.mul_(1 - rate * self._config.weight_decay)
        for rows in _pieces(gradients):
            values[rows].sub_(normalized(rows).mul_(rate / excess))

    def _remember(self, gradients: Tensor, square: Tensor, column: Tensor | None, step: int) -> Tensor | None:
        """Takes the gradient's squares into the averages; the column."""
        share = step**-self._config.decay  # 1 − β
        sums = gradients.new_zeros(gradients.shape[1], dtype=torch.float32)
        for rows in _pieces(gradients):
            squares = gradients[rows].float().square().add_(self._config.epsilon)
            square[rows].lerp_(squares.mean(1, keepdim=True), share)
            if column is not None:
                sums += squares.sum(0)
        return None if column is None else column.lerp_(sums / len(gradients), share)


def _pieces(matrix: Tensor) -> Iterator[slice]:
    """A few rows after the other."""
    size = max(1, CHUNK // matrix.shape[1])
    return (slice(start, start + size) for start in range(0, len(matrix), size))
