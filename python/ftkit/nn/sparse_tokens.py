"""Layers that only some tokens of a long context go through, while training.

    x[kept] ← layer(x[kept])        x[others] stays as it is

Where few tokens of a long sequence matter to what is learnt, a layer's work on the others is wasted, and so is the
memory that keeps their activations for the backward pass. A sequence is cut into blocks of 64 tokens. Before a layer, a
small predictor says from the hidden states which blocks will be looked at, and only these are gathered, go through
attention and feed-forward with their own positions, and are put back: for the others neither work nor activations
exist. A block that one layer leaves out may be in the next.

    score_mn = Q(m) · K(n) / √r           Q, K: the maximum over a block's tokens of relu(relu(h W₁) W₂) W₃
    block n is kept for the largest of its shares softmax_n(score_mn), over the blocks m that have a trained token

Trained tokens are always kept (`nn/blocks.py`), so each has the loss that it would have. Evaluation and serving go
through all tokens.

Source: Wang et al., LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning, 2025, arXiv 2501.09767 (as
Jenga at USENIX ATC 2025). Here the queries that count are those near trained tokens, not all; a layer leaves the same
tokens out of attention and feed-forward; and it keeps a share of the blocks, so that shapes are known beforehand, where
the paper keeps those above a threshold.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ftkit.nn.batch import RaggedBatch
from ftkit.nn.blocks import BLOCK, Blocks

RANK = 32
"""Columns of the predictors' matrices."""


class Predictor(nn.Module):
    """Tells of a layer's blocks which ones those with trained tokens will look at."""

    def __init__(self, width: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()

        def side() -> nn.ParameterList:
            shapes = ((width, RANK), (RANK, RANK), (RANK, RANK))
            made = (torch.randn(shape, generator=generator) * (2 / shape[0]) ** 0.5 for shape in shapes)
            return nn.ParameterList(nn.Parameter(matrix.to(device), requires_grad=False) for matrix in made)

        self.queries, self.keys = side(), side()

    def forward(self, h: Tensor, blocks: Blocks) -> Tensor:
        """The normed hidden states [T, d] to logits f32 [anchors, blocks], −∞ for blocks that are not in question."""
        places = blocks.on(h.device)
        keys = _low(h, self.keys)[places.tokens].amax(1)  # [blocks, rank]
        queries = _low(h[places.anchor_tokens], self.queries)[places.anchor_rows].amax(1)  # [anchors, rank]
        scores = queries.float() @ keys.float().t() / queries.shape[1] ** 0.5
        logits: Tensor = scores.masked_fill(~places.open, float("-inf"))
        return logits


def _low(h: Tensor, matrices: nn.ParameterList) -> Tensor:
    first, second, third = (matrix.to(h.dtype) for matrix in matrices)
    low: Tensor = torch.relu(torch.relu(h @ first) @ second) @ third
    return low


class SparseTokens(nn.Module):
    """The predictors of a decoder's layers, from the `first` on."""

    def __init__(
        self,
        layers: int,
        width: int,
        *,
        share: float,
        first: int = 0,
        seed: int = 0,
        size: int = BLOCK,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.share, self.first, self.size = share, first, size
        generator = torch.Generator().manual_seed(seed)
        device = torch.device(device)
        self.predictors = nn.ModuleDict({str(n): Predictor(width, generator, device) for n in range(first, layers)})

    def predictor(self, layer: int) -> Predictor | None:
        """The layer's, or None for one that takes all tokens."""
        found: Predictor | None = self.predictors._modules.get(str(layer))  # type: ignore[assignment]
        return found

    def blocks(self, batch: RaggedBatch) -> Blocks:
        """A batch's blocks. Needs targets."""
        trained = batch.host_trained if batch.host_trained is not None else batch.trained.tolist()
        return Blocks.of(batch.lengths, trained, self.share, self.size)

    def thinning(self, batch: RaggedBatch) -> "Thinning | None":
        """How a forward pass is thinned out; None where nothing of the batch can be left out."""
        if batch.targets is None:
            return None
        blocks = self.blocks(batch)
        return None if blocks.kept_lengths == batch.lengths else Thinning(self, batch, blocks)


class Thinning:
    """One forward pass of a batch through sparse layers."""

    def __init__(self, sparse: SparseTokens, batch: RaggedBatch, blocks: Blocks) -> None:
        self._sparse, self._batch, self._blocks = sparse, batch, blocks
        ends = [0]
        for length in blocks.kept_lengths:
            ends.append(ends[-1] + length)
        self._cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(batch.tokens.device)

    @torch.no_grad()
    def kept(self, number: int, layer: Any, x: Tensor) -> Tensor | None:
        """The rows of x [T, d] that go through a layer, i64 [kept tokens] in order; None: all."""
        predictor = self._sparse.predictor(number)
        if predictor is None:
            return None
        logits = predictor(layer.input_layernorm(x, self._batch.routes), self._blocks)
        return self._blocks.choose(best_shares(logits))

    def batch(self, kept: Tensor) -> RaggedBatch:
        """The batch of these rows, at the positions that they have."""
        return replace(
            self._batch,
            tokens=self._batch.tokens.index_select(0, kept),
            positions=self._batch.positions.index_select(0, kept),
            cu_seqlens=self._cu_seqlens,
            host_lengths=self._blocks.kept_lengths,
            targets=None,
            weights=None,
            host_trained=None,
        )


def best_shares(logits: Tensor) -> Tensor:
    """[anchors, blocks] to [blocks]: of each block the largest share that an anchor gives it; 0 where none may."""
    if not len(logits):
        return logits.new_zeros(logits.shape[1])
    return logits.softmax(-1).nan_to_num_(nan=0.0).amax(0)
