"""The ragged batch: what the host knows equals what the tensors say, and packing changes nothing."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny_models
from ftkit import adapters, models
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.nn.routes import Routes
from ftkit.objectives import sft

pytestmark = pytest.mark.unit

VARIANTS = ["llama llama3", "mistral", "qwen3 biases"]


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.peer(request.param).save_pretrained(path)
    return path


def random_rows(seed: int, count: int) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Tokens, targets with random gaps, and weights."""
    generator = torch.Generator().manual_seed(seed)
    rows, targets, weights = [], [], []
    for _ in range(count):
        length = int(torch.randint(1, 23, (1,), generator=generator))
        row = torch.randint(0, 97, (length,), generator=generator).tolist()
        trained = torch.rand(length, generator=generator) < 0.6
        rows.append(row)
        targets.append([t if on else -100 for t, on in zip([*row[1:], 3], trained.tolist(), strict=True)])
        weights.append(torch.rand(length, generator=generator).tolist())
    return rows, targets, weights


def loss_and_gradients(model: Decoder, batches: list[RaggedBatch]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    parameters = adapters.trainable(model)
    for parameter in parameters.values():
        parameter.grad = None
    total, count = torch.zeros((), dtype=model.dtype), torch.zeros((), dtype=model.dtype)
    for batch in batches:
        parts = sft.loss(model, batch)
        parts.sum.sum().backward()
        total, count = total + parts.sum.sum().detach(), count + parts.count.sum()
    return total / count, count, {name: p.grad / count for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_equals_unpacked(folder: Path, method: str, dtype: torch.dtype, tolerance: float) -> None:
    """The mean loss and its gradients are the same for random packings and for the rows alone."""
    model = models.load(folder, dtype=dtype).model
    adapters.attach(model, method, {}, seed=0)
    with torch.no_grad():
        for parameter in adapters.trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for seed in range(3):
        rows, targets, weights = random_rows(seed, 7)
        packed = RaggedBatch.pack(rows, targets=targets, weights=weights, adapter=0)
        alone = [
            RaggedBatch.pack([row], targets=[target], weights=[weight], adapter=0)
            for row, target, weight in zip(rows, targets, weights, strict=True)
        ]
        halves = [
            RaggedBatch.pack(rows[part], targets=targets[part], weights=weights[part], adapter=0)
            for part in (slice(0, 3), slice(3, 7))
        ]
        expected = loss_and_gradients(model, alone)
        for found in (loss_and_gradients(model, [packed]), loss_and_gradients(model, halves)):
            torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)
            assert found[2].keys() == expected[2].keys()
            for name, gradient in found[2].items():
                scale = expected[2][name].abs().max().clamp_min(1)
                assert (gradient - expected[2][name]).abs().max() <= tolerance * scale, name


def test_recomputed_layers_change_nothing(folder: Path) -> None:
    model = models.load(folder, dtype=torch.float64).model
    adapters.attach(model, "lora", {"dropout": 0.3}, seed=0)
    model.train()
    batch = RaggedBatch.pack(*random_rows(0, 5)[:1], targets=random_rows(0, 5)[1], adapter=0)
    found = []
    for layers in (0, 1, model.config.layers):
        model.recomputed_layers = layers
        torch.manual_seed(7)
        found.append(loss_and_gradients(model, [batch]))
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0])
        assert all(torch.equal(found[0][2][name], gradient) for name, gradient in other[2].items())


lengths = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@given(lengths, st.data())
@settings(max_examples=60, deadline=None)
def test_what_the_host_knows_is_what_the_tensors_say(counts: list[int], data: st.DataObject) -> None:
    rows = [[data.draw(st.integers(0, 50)) for _ in range(count)] for count in counts]
    targets = [[data.draw(st.sampled_from([-100, 4])) for _ in row] for row in rows]
    ids = [data.draw(st.integers(-1, 2)) for _ in rows]
    known = RaggedBatch.pack(rows, targets=targets, adapter=ids)
    read = dataclasses.replace(known, host_lengths=None, host_adapter=None, host_trained=None)
    assert read.lengths == known.lengths == tuple(counts)
    assert read.adapters == known.adapters == tuple(ids)
    assert read.routes == known.routes
    assert torch.equal(read.trained, known.trained)
    assert known.positions.tolist() == [i for count in counts for i in range(count)]
    assert known.sequence.tolist() == [n for n, count in enumerate(counts) for _ in range(count)]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 2)), min_size=1, max_size=9), st.data())
@settings(max_examples=60, deadline=None)
def test_routes_cover_each_row_once(sequences: list[tuple[int, int]], data: st.DataObject) -> None:
    by_row = [adapter for length, adapter in sequences for _ in range(length)]
    routes = Routes.of_sequences([length for length, _ in sequences], [adapter for _, adapter in sequences])
    rows = torch.arange(len(by_row))
    parts = [(adapter, rows[part]) for adapter, part in routes.parts]
    assert all(by_row[row] == adapter for adapter, part in parts for row in part.tolist())
    stream = torch.cat([part for _, part in parts])
    assert torch.equal(stream.index_select(0, routes.back), rows)
    chosen = data.draw(st.lists(st.integers(0, len(by_row) - 1), min_size=1))
    taken = routes.take(chosen)
    assert taken == Routes.of_rows([by_row[row] for row in chosen])


def test_a_wrong_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="targets: expected one for each of 3 tokens, got 2"):
        RaggedBatch.pack([[1, 2], [3]], targets=[[2], [3]])
    with pytest.raises(ValueError, match="adapter: expected one for each of 2 sequences, got 1"):
        RaggedBatch.pack([[1, 2], [3]], adapter=[0])
