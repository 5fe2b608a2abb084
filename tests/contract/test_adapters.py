"""What every finetuning method promises, checked for each file of the room."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from ftkit import adapters, models, plugins
from ftkit.errors import InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.objectives import sft

pytestmark = pytest.mark.contract

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in plugins.names("adapters")},
    "qalora joint": ("qalora", {"variant": "joint", "bits": 3}),
}
"""Every method, and variants that compute in another way: (method, options)."""
ROUNDED_AT_FIRST = {"qalora joint"}
"""Whose papers let the model start as its quantized self; the file's docstring says so."""
LENGTHS = (5, 11, 1, 7)
ROWS = [[(7 * i * length + 3 * i * i) % 97 for i in range(length)] for length in LENGTHS]
TARGETS = [[*row[1:], -100] for row in ROWS]


@pytest.fixture(scope="module", params=["llama", "qwen2 windows", "qwen3 biases"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of an untied model, and of two tied ones, one with biases; and of each with rows of whole groups."""
    path = tmp_path_factory.mktemp("model")
    tiny_models.peer(request.param).save_pretrained(path)
    tiny_models.peer(request.param, sizes=tiny_models.GROUPED).save_pretrained(path / "grouped")
    return path


@pytest.fixture(params=CASES)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def model(folder: Path, method: str) -> Decoder:
    """Dense, or as the method needs it."""
    name, options = CASES[method]
    scheme_for = getattr(plugins.load("adapters", name), "scheme_for", None)
    if scheme_for is None:
        return models.load(folder, dtype=torch.float64).model
    return models.load(folder / "grouped", dtype=torch.float64, quant=scheme_for("a directory", options)).model


def attach(model: Decoder, method: str, seed: int, adapter_id: int = 0, **more: Any) -> None:
    """Puts the case's adapter on the model."""
    name, options = CASES[method]
    adapters.attach(model, name, options | more, seed=seed, adapter_id=adapter_id)


def disturb(model: Decoder, adapter_id: int = 0, seed: int = 5) -> None:
    """Moves every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable(model, adapter_id).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def logits(model: Decoder, adapter_id: int | list[int] = 0, rows: list[list[int]] = ROWS) -> Tensor:
    batch = RaggedBatch.pack(rows, adapter=adapter_id)
    with torch.no_grad():
        return model.head(model(batch), batch.routes)


def equal(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_output_is_unchanged_at_first(model: Decoder, method: str) -> None:
    before = logits(model, -1)
    attach(model, method, seed=3)
    if method not in ROUNDED_AT_FIRST:
        assert torch.equal(logits(model, 0), before)
        return
    # as a model of the matrices' nearest codes, near the base's
    other = _holding(model, model.tensors() | {name: w.dense() for name, w in adapters.merged_weights(model).items()})
    assert torch.equal(logits(model, 0), logits(other, -1))
    assert 0.01 < (logits(model, 0) - before).std() / before.std() < 1


def test_first_values_depend_on_the_seed_alone(model: Decoder, method: str) -> None:
    for adapter_id, seed in ((0, 3), (1, 3), (2, 4)):
        attach(model, method, seed=seed, adapter_id=adapter_id)
    first, same, other = (adapters.trainable(model, number) for number in range(3))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert method == "full" or any(not torch.equal(first[name], other[name]) for name in first)


def test_merged_does_the_same(model: Decoder, method: str) -> None:
    attach(model, method, seed=3)
    disturb(model)
    expected = logits(model, 0)
    merged = adapters.merged(model, 0)
    adapters.detach(model, 0)
    equal(logits(_holding(model, merged), -1), expected)


def test_what_merges_into_the_weights_own_format_is_what_is_merged(model: Decoder, method: str) -> None:
    attach(model, method, seed=3)
    disturb(model)
    merged = adapters.merged(model, 0)
    for name, weight in adapters.merged_weights(model, 0).items():
        base = model.linears()[name.removesuffix(".weight")].weight
        assert torch.equal(weight.dense(), merged[name])
        assert not torch.equal(base.dense(), merged[name])
        assert weight.shape == base.shape
        if method == "qalora":
            assert (type(weight), weight.nbytes) == (type(base), base.nbytes)
        blocks = weight.blocks_of_file()
        assert blocks is not None
        assert blocks[1].nbytes == weight.nbytes == weight.shape[0] * weight.shape[1] * 5 // 8


def test_as_lora_does_the_same(model: Decoder, method: str) -> None:
    attach(model, method, seed=3)
    disturb(model)
    generator = torch.Generator().manual_seed(1)
    for linear in model.linears().values():
        adapter = linear.adapter(0)
        lora = None if adapter is None else adapter.as_lora()
        if adapter is not None and lora is not None:
            a, b, scale = lora
            x = torch.randn(7, linear.shape[1], generator=generator, dtype=torch.float64)
            equal(adapter.forward(x, linear.weight), linear.weight.matmul(x) + scale * (x @ a.T) @ b.T)


def test_gradients_reach_what_is_trained_and_nothing_else(model: Decoder, method: str) -> None:
    attach(model, method, seed=3)
    disturb(model)
    sft.loss(model, RaggedBatch.pack(ROWS, targets=TARGETS, adapter=0)).sum.sum().backward()
    trained = adapters.trainable(model)
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())
    known = {id(parameter) for parameter in trained.values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in known)


def test_frozen_weights_keep_their_bits(model: Decoder, method: str) -> None:
    options: dict[str, Any] = {"keep_base": True} if method == "full" else {}
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    attach(model, method, seed=3, **options)
    optimizer = torch.optim.SGD(adapters.trainable(model).values(), lr=0.1)
    for _ in range(2):
        sft.loss(model, RaggedBatch.pack(ROWS, targets=TARGETS, adapter=0)).sum.sum().backward()
        optimizer.step()
    assert not torch.equal(logits(model, 0), logits(model, -1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())


def test_save_and_load_is_exact(model: Decoder, method: str, tmp_path: Path) -> None:
    attach(model, method, seed=3)
    disturb(model)
    expected, parameters = logits(model, 0), adapters.trainable(model, 0)
    adapters.save(model, 0, tmp_path / "adapter")
    adapters.load(model, tmp_path / "adapter", 1)
    loaded = adapters.trainable(model, 1)
    assert {name: p.shape for name, p in parameters.items()} == {name: p.shape for name, p in loaded.items()}
    assert all(torch.equal(loaded[name], parameter) for name, parameter in parameters.items())
    assert not any(parameter.requires_grad for parameter in loaded.values())
    assert torch.equal(logits(model, 1), expected)


def test_packed_rows_are_as_alone(model: Decoder, method: str) -> None:
    attach(model, method, seed=3)
    disturb(model)
    equal(logits(model, 0), torch.cat([logits(model, 0, [row]) for row in ROWS]))


def test_no_token_sees_a_later_one(model: Decoder, method: str) -> None:
    attach(model, method, seed=3)
    disturb(model)
    row = ROWS[1]
    changed = [*row[:6], (row[6] + 1) % 97, *row[7:]]
    first, second = logits(model, 0, [row]), logits(model, 0, [changed])
    equal(first[:6], second[:6])
    assert not torch.allclose(first[6:], second[6:])


def test_adapters_meet_in_one_batch(model: Decoder, method: str) -> None:
    """Rows of the base, of this method twice, and of LoRA, each as alone."""
    for adapter_id, name in ((0, method), (1, "lora"), (2, method)):
        options: dict[str, Any] = {"keep_base": True} if name == "full" else {}
        attach(model, name, adapter_id, adapter_id, **options)
        disturb(model, adapter_id, seed=adapter_id)
    rows, routes = [*ROWS, *ROWS], [0, -1, 2, 1, 2, 0, 1, -1]
    together = logits(model, routes, rows).split([len(row) for row in rows])
    for row, route, found in zip(rows, routes, together, strict=True):
        equal(found, logits(model, route, [row]))


def test_gradients_are_the_same_in_a_mixed_batch(model: Decoder, method: str) -> None:
    """A row's gradient does not depend on rows under other adapters."""
    found: list[dict[str, Tensor]] = []
    for adapter_id in (0, 1):
        options: dict[str, Any] = {"keep_base": True} if method == "full" else {}
        attach(model, method, 3, adapter_id, **options)
        disturb(model, adapter_id)
    for routes, rows, targets in (([0, 1, 0, -1], ROWS, TARGETS), ([0, 0], ROWS[:3:2], TARGETS[:3:2])):
        masked = [row if route == 0 else [-100] * len(row) for row, route in zip(targets, routes, strict=True)]
        sft.loss(model, RaggedBatch.pack(rows, targets=masked, adapter=routes)).sum.sum().backward()
        parameters = adapters.trainable(model, 0)
        found.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        equal(found[0][name], found[1][name])


def test_what_is_trained_counts_as_its_formula_says(model: Decoder, method: str) -> None:
    attach(model, method, seed=3)
    count = sum(parameter.numel() for parameter in adapters.trainable(model).values())
    expected = {
        "lora": sum(16 * sum(linear.shape) for name, linear in model.linears().items() if name != "lm_head"),
        "full": sum(tensor.numel() for tensor in model.tensors().values()),
        "qalora": sum(
            16 * (linear.shape[0] + linear.shape[1] // 32)
            for name, linear in model.linears().items()
            if name != "lm_head"
        ),
        "qalora joint": sum(
            16 * sum(linear.shape) + 2 * linear.shape[0] * (linear.shape[1] // 32)
            for name, linear in model.linears().items()
            if name != "lm_head"
        ),
    }
    assert count == expected[method]


def test_another_base_is_refused(model: Decoder, method: str, tmp_path: Path) -> None:
    attach(model, method, seed=3)
    adapters.save(model, 0, tmp_path / "adapter", base_fingerprint="sha256:other")
    with pytest.raises(InputError, match="expected an adapter for this base model"):
        adapters.load(model, tmp_path / "adapter", 1)
    adapters.load(model, tmp_path / "adapter", 1, any_base=True)


def test_keys_and_shapes_must_fit(model: Decoder, method: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    attach(model, method, seed=3)
    adapters.save(model, 0, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second, third, *_ = sorted(tensors)
    del tensors[first]
    tensors[second] = tensors[second][..., :-1].contiguous()
    tensors[third] = torch.full_like(tensors[third], float("nan"))
    save_file(tensors | {"base_model.model.model.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError) as caught:
        adapters.load(model, tmp_path / "adapter", 1)
    message = str(caught.value)
    for part in (first, second, third, "got nothing", "expected shape", "expected finite", "extra.weight"):
        assert part in message
    assert 1 not in model.attached
    assert torch.equal(logits(model, 1), logits(model, -1))


def test_unknown_options_are_refused(model: Decoder, method: str) -> None:
    with pytest.raises(InputError, match="no_such_option"):
        attach(model, method, seed=0, no_such_option=1)


def _holding(model: Decoder, tensors: dict[str, Tensor]) -> Decoder:
    """A model of the same configuration with these weights."""
    import dataclasses

    config = dataclasses.replace(model.config, tied_embeddings="lm_head.weight" not in tensors)
    other = models.build(config, torch.float64)
    with torch.no_grad():
        layers: dict[str, Any] = dict(other.layers_by_name())
        for name, tensor in tensors.items():
            layer, _, kind = name.rpartition(".")
            place = layers[layer].bias if kind == "bias" else layers[layer].weight
            (place if isinstance(place, nn.Parameter) else place.tensor).copy_(tensor)
    return other
