"""Layers that only some tokens go through: what they keep, and that kept tokens get what a masked layer gives them."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import ours, peer
from torch import Tensor

from ftkit import adapters
from ftkit.kernels.informativeness import informativeness
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.blocks import Blocks
from ftkit.nn.decoder import Decoder
from ftkit.nn.sparse_tokens import SparseTokens, Thinning, best_shares
from ftkit.objectives import sft

pytestmark = pytest.mark.unit

SIZE = 3
"""Tokens of a block."""


def model(folder: Path, variant: str = "qwen3", **options: float) -> Decoder:
    """A tiny model with a LoRA that does something, and sparse layers but for the first."""
    found = ours(peer(variant), folder).model.train()
    adapters.attach(found, "lora", {"rank": 2}, seed=3)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters.trainable(found).values():
        with torch.no_grad():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
    found.sparse_tokens = SparseTokens(3, 48, first=1, size=SIZE, **{"share": 0.4, **options})  # type: ignore[arg-type]
    return found


def batch(lengths: tuple[int, ...], last: int = 2, start: int = 0) -> RaggedBatch:
    """Random sequences, trained on at their `last` places."""
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths][start:]
    targets = [[-100] * (len(row) - last) + row[-last:] for row in drawn]
    return RaggedBatch.pack(drawn, targets=targets, adapter=0)


def gradients(model: Decoder, batches: list[RaggedBatch]) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for one in batches:
        loss = sft.loss(model, one).sum.sum()
        loss.backward()
        total += float(loss.detach())
    found = {name: p.grad.clone() for name, p in adapters.trainable(model).items() if p.grad is not None}
    for parameter in adapters.trainable(model).values():
        parameter.grad = None
    return total, found


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


@settings(max_examples=60)
@given(st.data())
def test_as_many_blocks_are_kept_as_lengths_and_trained_places_say_and_the_best_of_them(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 23), min_size=1, max_size=4))
    total = sum(lengths)
    trained = sorted(data.draw(st.sets(st.integers(0, total - 1), max_size=5)))
    share = data.draw(st.floats(0.01, 1.0))
    blocks = Blocks.of(lengths, trained, share, SIZE)
    scores = torch.tensor(data.draw(st.permutations(range(len(blocks.starts)))), dtype=torch.float32)
    rows = blocks.choose(scores).tolist()
    assert rows == sorted(set(rows))
    assert set(trained) <= set(rows)
    start = 0
    for number, length in enumerate(lengths):
        mine = [row - start for row in rows if start <= row < start + length]
        count = -(-length // SIZE)
        cut = [list(range(begin, min(begin + SIZE, length))) for begin in range(0, length, SIZE)]
        first = blocks.firsts[number]
        asked = {(place - start) // SIZE for place in trained if start <= place < start + length} | {0, count - 1}
        free = sorted(set(range(count)) - asked, key=lambda block: -scores[first + block])
        kept = sorted(asked | set(free[: max(math.ceil(share * count) - len(asked), 0)]))
        assert mine == [place for block in kept for place in cut[block]]
        assert len(mine) == blocks.kept_lengths[number]
        start += length


def test_where_everything_is_kept_the_bits_are_those_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, rows = model(tmp_path, share=1.0), batch((17, 11))
    assert sparse.sparse_tokens is not None
    whole = Thinning(sparse.sparse_tokens, rows, sparse.sparse_tokens.blocks(rows))
    assert sparse.thinning(rows) is None
    expected = gradients(sparse, [rows])
    monkeypatch.setattr(sparse, "thinning", lambda _: whole)  # all rows are gathered, and put back
    found = gradients(sparse, [rows])
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


def masked(model: Decoder, rows: RaggedBatch) -> Tensor:
    """The twin: every token goes through every layer; what is left out is hidden from attention, and its result is not
    used. In plain torch, with a matrix of all tokens by all tokens."""
    thinning = model.thinning(rows)
    assert thinning is not None
    x = model.embed_tokens(rows.tokens, rows.routes)
    angles = model.rotary(rows.positions, x.dtype)
    place = torch.arange(len(rows.tokens))
    for number, layer in enumerate(model.layers):
        kept = thinning.kept(number, layer, x)
        stays = torch.ones(len(place), dtype=torch.bool) if kept is None else torch.isin(place, kept)
        seen = (
            (rows.sequence[:, None] == rows.sequence) & (place <= place[:, None]) & (stays | (place == place[:, None]))
        )
        q, k, v = layer.self_attn.projected(layer.input_layernorm(x, rows.routes), angles, rows.routes)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
        y = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
        middle = x + layer.self_attn.o_proj(y.flatten(1), rows.routes)
        after = middle + layer.mlp(layer.post_attention_layernorm(middle, rows.routes), rows.routes)
        x = torch.where(stays[:, None], after, x)
    return model.norm(x, rows.routes)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("recomputed", [0, 2])
def test_kept_tokens_get_what_a_masked_layer_gives_them(tmp_path: Path, variant: str, recomputed: int) -> None:
    sparse, rows = model(tmp_path, variant), batch((23, 5, 17))
    sparse.recomputed_layers = recomputed
    found = gradients(sparse, [rows])
    expected = sft.loss(_Twin(sparse), rows).sum.sum()  # type: ignore[arg-type]
    expected.backward()
    assert found[0] == pytest.approx(float(expected.detach()), rel=1e-12)
    assert_near(found[1], {name: p.grad for name, p in adapters.trainable(sparse).items() if p.grad is not None})


class _Twin:
    """The masked forward pass as an objective takes it."""

    def __init__(self, of: Decoder) -> None:
        self.config, self.lm_head, self.head, self._of = of.config, of.lm_head, of.head, of

    def __call__(self, rows: RaggedBatch) -> Tensor:
        return masked(self._of, rows)


def test_the_company_of_a_packed_sequence_changes_nothing(tmp_path: Path) -> None:
    sparse, lengths = model(tmp_path), (23, 31, 17)
    together = gradients(sparse, [batch(lengths)])
    alone = gradients(sparse, [batch(lengths[: number + 1], start=number) for number in range(3)])
    assert together[0] == pytest.approx(alone[0], rel=1e-12)
    assert_near(together[1], alone[1])


def test_evaluation_takes_all_tokens(tmp_path: Path) -> None:
    sparse, rows = model(tmp_path), batch((23, 17))
    dense = sparse.eval()(rows)
    assert torch.equal(dense, sparse(rows))
    assert not torch.equal(dense, sparse.train()(rows))
    with torch.no_grad():
        assert torch.equal(dense, sparse(rows))


def test_what_a_thinned_layer_keeps_for_the_way_back_goes_with_the_tokens_that_it_takes(tmp_path: Path) -> None:
    sparse, rows = model(tmp_path, share=0.2), batch((400,))

    def saved(first: int) -> int:
        sparse.sparse_tokens = SparseTokens(3, 48, share=0.2, first=first, size=SIZE)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sparse(rows)
        return sum(kept.values())

    dense, one, all_three = saved(3), saved(2), saved(0)
    layer = (dense - one) / 0.8  # of what one layer keeps, 0.8 goes
    assert dense - all_three == pytest.approx(3 * 0.8 * layer, rel=0.05)
    assert all_three < 0.35 * dense


def test_informativeness_is_the_attention_that_a_block_gets() -> None:
    generator = torch.Generator().manual_seed(11)
    q, k = (torch.randn(17, heads, 5, generator=generator, dtype=torch.float64) for heads in (6, 3))
    anchors = ((6, 9, 0, 0), (9, 11, 0, 0), (14, 17, 11, 4))  # sequences of 11 and 6 tokens: blocks of 3, 3, 3, 2; 3, 3
    asking = torch.cat([q[start:end] for start, end, _, _ in anchors])
    found = informativeness(asking, k, anchors, 6, size=3, scale=0.7)
    sequence = torch.tensor([0] * 11 + [1] * 6)
    block = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5])
    place = torch.arange(17)
    scores = 0.7 * torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1))
    seen = (sequence[:, None] == sequence) & (place <= place[:, None])
    shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)  # [heads, 17, 17]
    for number, (start, end, _, _) in enumerate(anchors):
        for other in range(6):
            expected = shares[:, start:end][:, :, block == other].sum(-1).max()
            assert found[number, other].item() == pytest.approx(float(expected), abs=1e-6)


def test_a_block_counts_as_much_as_for_whom_it_matters_most() -> None:
    logits = torch.tensor([[0.0, 2.0, -math.inf], [-math.inf] * 3, [0.0, 0.0, 0.0]])
    share = math.exp(2) / (1 + math.exp(2))
    torch.testing.assert_close(best_shares(logits), torch.tensor([1 / 3, share, 1 / 3]))
    assert best_shares(logits[:0]).tolist() == [0.0, 0.0, 0.0]
