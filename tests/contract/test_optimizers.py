"""Every optimizer: moves what has a gradient and nothing else, resumes to the bit, and finds the bottom of a bowl."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ftkit import plugins
from ftkit.config import Choice
from ftkit.optim import Optimizer, _optimizer, build

pytestmark = pytest.mark.contract

NAMES = plugins.names("optim")
DTYPES = [torch.float32, torch.bfloat16]
EMBEDDING = "model.embed_tokens.weight"
# Sides that no block of 256 divides, on both sides of the size from which states may be quantized.
SHAPES = {
    "model.layers.0.up_proj.weight": (67, 71),
    "model.layers.0.lora_A": (3, 41),
    "model.layers.0.norm.weight": (71,),
    "model.layers.0.z": (4099,),
    EMBEDDING: (73, 59),
}
Parameters = dict[str, torch.nn.Parameter]


def parameters(dtype: torch.dtype = torch.float32) -> Parameters:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }


def set_gradients(weights: Mapping[str, torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.grad = (scale * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def made(name: str, weights: Parameters, **options: Any) -> Optimizer:
    return build(Choice(name=name, options={"learning_rate": 1e-2, **options}), weights)


def steps(optimizer: Optimizer, weights: Parameters, start: int, stop: int) -> None:
    for step in range(start, stop):
        set_gradients(weights, step)
        optimizer.step(1 / (1 + step))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_continues_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    straight, first = parameters(dtype), parameters(dtype)
    optimizer, other = made(name, straight), made(name, first)
    steps(optimizer, straight, 0, 4)
    steps(other, first, 0, 4)
    assert all(torch.equal(straight[key], first[key]) for key in SHAPES)
    resumed = {key: torch.nn.Parameter(weight.detach().clone()) for key, weight in first.items()}
    fresh = made(name, resumed)
    fresh.load({key: value.clone() for key, value in other.state().items()})
    steps(optimizer, straight, 4, 8)
    steps(fresh, resumed, 4, 8)
    assert all(torch.equal(straight[key], resumed[key]) for key in SHAPES)
    ends, again = optimizer.state(), fresh.state()
    assert all(torch.equal(ends[key], again[key]) for key in ends)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_named_after_their_parameters(name: str) -> None:
    for dtype in DTYPES:
        state = made(name, parameters(dtype)).state()
        rest = {key for key in state if key != "steps"}
        assert {key.partition("/")[2] for key in rest} == set(SHAPES)
        assert all(key.count("/") == 1 for key in rest)
        assert {f"copy/{key}" in state for key in SHAPES} == {dtype != torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_another_state_is_refused_and_changes_nothing(name: str) -> None:
    optimizer = made(name, parameters())
    mine = {key: value.clone() for key, value in optimizer.state().items()}
    key = next(key for key in mine if key != "steps")
    without = {other: value for other, value in mine.items() if other != key}
    others: list[dict[str, torch.Tensor]] = [without, mine | {"more/name": torch.zeros(1)}]
    others += [mine | {key: mine[key].double() + 1}, mine | {key: torch.ones(5, dtype=mine[key].dtype)}]
    for other in others:
        with pytest.raises((KeyError, RuntimeError)):
            optimizer.load(other)
    assert all(torch.equal(value, mine[each]) for each, value in optimizer.state().items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_gradient_stays_and_so_does_its_state(name: str, dtype: torch.dtype) -> None:
    weights, before = parameters(dtype), parameters(dtype)
    optimizer = made(name, weights, weight_decay=0.1)
    states = {key: value.clone() for key, value in optimizer.state().items()}
    for left_out in SHAPES:
        set_gradients(weights, 3)
        weights[left_out].grad = None
        before = {key: torch.nn.Parameter(weight.detach().clone()) for key, weight in weights.items()}
        states = {key: value.clone() for key, value in optimizer.state().items()}
        optimizer.step(1.0)
        for key, weight in weights.items():
            assert torch.equal(weight, before[key]) == (key == left_out)
        after = optimizer.state()
        assert all(torch.equal(after[key], states[key]) for key in after if key.endswith(f"/{left_out}"))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_what_lies_beside_a_parameter_in_memory_stay(name: str) -> None:
    buffers = {key: torch.full((weight.numel() + 64,), 7.0) for key, weight in parameters().items()}
    weights = {}
    for key, weight in parameters().items():
        inside = buffers[key][32:-32].view(weight.shape)
        inside.copy_(weight.detach())
        weights[key] = torch.nn.Parameter(inside)
    optimizer = made(name, weights, weight_decay=0.1)
    set_gradients(weights, 0)
    gradients = {key: weight.grad.clone() for key, weight in weights.items()}  # type: ignore[union-attr]
    optimizer.step(1.0)
    assert all(torch.equal(weights[key].grad, gradients[key]) for key in SHAPES)  # type: ignore[arg-type]
    for key, buffer in buffers.items():
        assert torch.equal(buffer[:32], torch.full((32,), 7.0))
        assert torch.equal(buffer[-32:], torch.full((32,), 7.0))
        assert not torch.equal(weights[key], parameters()[key])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_factor_of_zero_changes_no_weight(name: str, dtype: torch.dtype) -> None:
    weights, before = parameters(dtype), parameters(dtype)
    optimizer = made(name, weights, weight_decay=0.1)
    for step in range(3):
        set_gradients(weights, step)
        optimizer.step(0.0)
    assert all(torch.equal(weights[key], before[key]) for key in SHAPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_zero_or_nearly_zero_give_finite_weights(name: str, dtype: torch.dtype) -> None:
    weights, before = parameters(dtype), parameters(dtype)
    optimizer = made(name, weights)
    for scale in (0.0, 0.0, 1e-12, 1e-30, 0.0, 1.0, 0.0):
        if scale == 1e-12:
            assert all(torch.equal(weights[key], before[key]) for key in SHAPES)
        set_gradients(weights, 5, scale)
        optimizer.step(1.0)
        assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert all(bool(value.isfinite().all()) for value in optimizer.state().values())
    # two steps with gradients worth the name move nothing by more than a few rates
    assert all(float((weights[key] - before[key]).detach().abs().max()) < 0.5 for key in SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_touches_matrices_only_and_no_embedding(name: str) -> None:
    with_decay, without = parameters(), parameters()
    for weights, decay in ((with_decay, 0.5), (without, 0.0)):
        set_gradients(weights, 0)
        made(name, weights, weight_decay=decay).step(1.0)
    for key, shape in SHAPES.items():
        decayed = parameters()[key].detach() * 0.5 * 1e-2
        expected = decayed if len(shape) == 2 and key != EMBEDDING else torch.zeros(shape)
        torch.testing.assert_close((without[key] - with_decay[key]).detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_finds_the_bottom_of_a_bowl(name: str, dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    goal = {key: torch.randn(shape, generator=torch.Generator().manual_seed(9)) for key, shape in SHAPES.items()}
    optimizer = made(name, weights, learning_rate=0.2)

    def loss() -> torch.Tensor:
        return torch.stack([(weights[key].float() - goal[key]).square().mean() for key in SHAPES]).sum()

    start = float(loss().detach())
    for step in range(200):
        for weight in weights.values():
            weight.grad = None
        loss().backward()
        optimizer.step(1 - step / 200)
    assert float(loss().detach()) < 0.02 * start


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_one_parameter_after_the_other_is_the_same_as_all_at_once(name: str, dtype: torch.dtype) -> None:
    """In any order: what an update in the backward pass relies on."""
    whole, parts = parameters(dtype), parameters(dtype)
    optimizer, other = made(name, whole), made(name, parts)
    for step in range(3):
        set_gradients(whole, step)
        set_gradients(parts, step)
        optimizer.step(0.5)
        other.begin()
        for key in reversed(SHAPES):
            other.update(key, 0.5)
            parts[key].grad = None
    assert all(torch.equal(whole[key], parts[key]) for key in SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_the_pieces_that_it_works_in_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = parameters(), parameters()
    steps(made(name, whole), whole, 0, 3)
    for module in (_optimizer, plugins.load("optim", name)):
        if hasattr(module, "CHUNK"):
            monkeypatch.setattr(module, "CHUNK", 512)
    steps(made(name, pieces), pieces, 0, 3)
    for key in SHAPES:
        torch.testing.assert_close(whole[key], pieces[key], rtol=1e-6, atol=1e-7)
