"""Sparse tokens in a run: which runs can have them, how their predictors learn, and where they are kept.

Before the first step the base model reads some of the run's own batches, densely and without gradients. In each layer
the exact attention of blocks with trained tokens is computed, and that layer's predictor learns to tell from the hidden
states which blocks get how much of it:

    loss = − mean over anchors m   Σ_n p_mn log softmax_n(score_mn),      p_mn = I_mn / Σ_n I_mn

over the blocks n that may be left out, with I as `kernels/informativeness.py` has it. Then the predictors stand still,
lie in the run's directory, and are read from there when it is resumed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftkit import optim, plugins
from ftkit.config import Choice, RunConfig
from ftkit.errors import InputError
from ftkit.kernels.informativeness import informativeness
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.blocks import Blocks
from ftkit.nn.decoder import Attention, Decoder
from ftkit.nn.sparse_tokens import SparseTokens, best_shares
from ftkit.train import files, sharding

_FILE = "predictors.safetensors"
BATCHES = 24
"""That predictors learn from."""
UPDATES = 8
"""Of each predictor in a batch."""
RATE = 3e-3
ANCHORS = 16
"""Of a batch, evenly spread: what is learned from one is much like what is learned from the next."""
DENSE_SHARE = 0.2
"""Of the layers, from the first on: those that take all tokens."""


def attach(config: RunConfig, model: Decoder) -> None:
    """Makes the layers sparse that the configuration asks for; their predictors have yet to learn.

    Raises InputError for what cannot be combined.
    """
    training, sizes = config.training, model.config
    if training.sparse_tokens == 1:
        return
    if plugins.load("objectives", config.objective.name).PAIRS:
        raise InputError(
            "training.sparse_tokens: expected 1 with answers that are compared, got "
            f"{training.sparse_tokens} with {config.objective.name!r}",
            "each would be under another context; objectives of single answers take it: sft, mft, distill",
        )
    if training.precision != "dtype":
        raise InputError(
            f"training.sparse_tokens: expected 1 with training.precision = {training.precision!r}, got "
            f"{training.sparse_tokens}",
            "a step in 8 bits is held against an exact one, which could leave out other tokens",
        )
    if sharding.shares(config) > 1:
        raise InputError(
            f"training.sparse_tokens: expected 1 with weights that processes share out, got {training.sparse_tokens}",
            "training.shard = false leaves them whole in each, and so does a method that trains few weights",
        )
    windows = [window for window in map(sizes.window, range(sizes.layers)) if window is not None]
    if windows and min(windows) < config.data.max_tokens:
        raise InputError(
            f"training.sparse_tokens: expected 1 with layers that see {min(windows)} tokens of "
            f"{config.data.max_tokens}, got {training.sparse_tokens}",
            "a window counts neighbours, and some of them would be left out; data.max_tokens may be as long as it",
        )
    first = max(1, round(DENSE_SHARE * sizes.layers))
    share, seed = training.sparse_tokens, training.seed
    model.sparse_tokens = SparseTokens(
        sizes.layers, sizes.hidden_size, share=share, first=first, seed=seed, device=model.device
    )


def prepare(model: Decoder, batches: Iterable[RaggedBatch], path: Path, *, write: bool, done: int) -> list[str]:
    """The model's predictors, as they lie in the run's folder of them, or else learned from batches and written there.

    `done`: the steps that the run has behind it. Returns what people should know. Raises InputError for a file that
    is lost, or is none of this model's.
    """
    sparse = model.sparse_tokens
    if sparse is None:
        return []
    if path.exists():
        _load(sparse, path / _FILE)
        return []
    if done:
        raise InputError(f"{path}: expected the predictors that the run began with, got nothing", "start a new run")
    was_training, learner = model.training, Learner(model)
    model.eval()
    try:
        told = [seen for seen in map(learner.read, batches) if seen is not None]
    finally:
        model.train(was_training)
    if write:
        with files.new_directory(path) as temporary:
            save_file({name: p.detach().cpu().contiguous() for name, p in sparse.named_parameters()}, temporary / _FILE)
    return [_notice(sparse, told)]


def _notice(sparse: SparseTokens, told: Sequence[tuple[float, Tensor]]) -> str:
    if not told:
        return (
            "sparse tokens: nothing is left out, since every block of 64 tokens that was looked at has a trained token "
            "or is at an edge of its text (data.train_on = last trains less of a conversation)"
        )
    share = sum(kept for kept, _ in told) / len(told)
    late = [seen for _, seen in told[len(told) // 2 :]]  # the predictors that a run has are later still
    found, best = torch.stack(late).double().sum(0).sum(0).tolist()
    return (
        f"sparse tokens: {len(sparse.predictors)} layers take {share:.0%} of the tokens; their predictors find "
        f"{found / max(best, 1e-9):.0%} of the attention that so many blocks can have"
    )


def _load(sparse: SparseTokens, path: Path) -> None:
    try:
        sparse.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0].lower()
        raise InputError(f"{path}: expected the predictors of this run, got: {reason}") from None


class Learner:
    """The predictors of a model while they learn."""

    def __init__(self, model: Decoder) -> None:
        assert model.sparse_tokens is not None
        self._model, self._sparse = model, model.sparse_tokens
        self._parameters = {name: dict(p.named_parameters()) for name, p in self._sparse.predictors.items()}
        choice = Choice(name="adamw", options={"learning_rate": RATE})
        self._optimizers = {name: optim.build(choice, own) for name, own in self._parameters.items()}

    @torch.no_grad()
    def read(self, batch: RaggedBatch, updates: int = UPDATES) -> tuple[float, Tensor] | None:
        """The model reads a batch, and its predictors learn, `updates` times each.

        Returns the share of its tokens that is kept, and of each layer f32 [layers, 2] how much attention the blocks
        get that its predictor would have kept before, and the best choice; None where nothing can be left out.
        """
        model, sparse, blocks = self._model, self._sparse, self._sparse.blocks(batch)
        if blocks.kept_lengths == batch.lengths or not blocks.anchors:
            return None
        blocks = blocks.with_anchors(ANCHORS)
        x = model.embed_tokens(batch.tokens, batch.routes)
        angles = model.rotary(batch.positions, x.dtype)
        found = []
        layers: Any = model.layers
        for number, layer in enumerate(layers):
            if sparse.predictor(number) is not None:
                h = layer.input_layernorm(x, batch.routes)
                wanted = _attention(layer.self_attn, h, angles, batch, blocks)
                logits = self._learn(str(number), h, blocks, wanted, updates)
                most = wanted.amax(0)  # [blocks]
                kept = (blocks.choose_blocks(scores) for scores in (best_shares(logits), most))
                found.append(torch.stack([most.masked_fill(~chosen, 0.0).sum() for chosen in kept]))
            x = layer(x, angles, batch, None)
        return sum(blocks.kept_lengths) / len(batch.tokens), torch.stack(found)

    def _learn(self, name: str, h: Tensor, blocks: Blocks, wanted: Tensor, updates: int) -> Tensor:
        """The predictor's logits before its updates."""
        predictor, own, optimizer = self._sparse.predictors[name], self._parameters[name], self._optimizers[name]
        before: Tensor = predictor(h, blocks)
        shares = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-9)  # an anchor without free blocks teaches nothing
        for parameter in own.values():
            parameter.requires_grad_()
        for _ in range(updates):
            with torch.enable_grad():
                logs = predictor(h, blocks).log_softmax(-1)
                loss = -(shares * logs.masked_fill(shares == 0, 0.0)).sum(-1).mean()
            for parameter, gradient in zip(own.values(), torch.autograd.grad(loss, list(own.values())), strict=True):
                parameter.grad = gradient
            optimizer.step(1.0)
        for parameter in own.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        return before


def _attention(
    attention: Attention, h: Tensor, angles: tuple[Tensor, Tensor], batch: RaggedBatch, blocks: Blocks
) -> Tensor:
    """f32 [anchors, blocks]: what free blocks get of a layer's exact attention."""
    q, k, _ = attention.projected(h, angles, batch.routes)
    places = blocks.on(h.device)
    firsts = [blocks.firsts[blocks.sequence[block]] for block in blocks.anchors]
    asking = tuple(
        (blocks.starts[block], blocks.ends[block], blocks.starts[first], first)
        for block, first in zip(blocks.anchors, firsts, strict=True)
    )
    scale = q.shape[-1] ** -0.5
    found = informativeness(q[places.anchor_tokens], k, asking, len(blocks.starts), size=blocks.size, scale=scale)
    return found.masked_fill_(~places.open, 0.0)
