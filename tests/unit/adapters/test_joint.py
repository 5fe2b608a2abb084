"""QA-LoRA's joint variant: its parts move at rates of their own, and start as the nearest codes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from ftkit import adapters, optim
from ftkit.config import Choice, RunConfig
from ftkit.kernels.joint_linear import stored
from ftkit.nn.decoder import Decoder
from ftkit.quant import int4_group

pytestmark = pytest.mark.unit

JOINT: dict[str, Any] = {"variant": "joint", "bits": 4}


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    """A model with one layer whose weights, and so steps, are 5 times as large as they were."""
    theirs = tiny_models.peer("llama", sizes=tiny_models.GROUPED)
    theirs.model.layers[1].mlp.up_proj.weight.data.mul_(5)
    return tiny_models.ours(theirs, tmp_path / "model", torch.float32).model


def test_it_starts_as_what_is_nearest(model: Decoder) -> None:
    """The codes of `int4_group:32`, by the same least squares."""
    dense = {name: linear.weight.dense() for name, linear in model.linears().items()}
    adapters.attach(model, "qalora", JOINT, seed=0)
    for name, weight in adapters.merged_weights(model).items():
        nearest = int4_group.scheme("32").weight(dense[name.removesuffix(".weight")], torch.float32)
        assert torch.equal(weight.dense(), nearest.dense())


def test_an_update_moves_weights_in_proportion_to_the_steps_of_their_layer(model: Decoder) -> None:
    adapters.attach(model, "qalora", JOINT | {"alpha": 32.0, "rank": 16}, seed=0)
    parameters = adapters.trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    layers = {name: linear for name, linear in model.linears().items() if linear.adapter(0) is not None}
    first = {name: stored(linear.adapter(0)._trained) for name, linear in layers.items()}  # type: ignore[union-attr]
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optim.build(Choice(name="adamw", options={"learning_rate": 0.01}), parameters).step(1.0)
    moved, steps = [], []
    for name, linear in layers.items():
        adapter: Any = linear.adapter(0)
        change = adapter.lora_B.detach() - before[f"{name}.lora_B"]
        torch.testing.assert_close(change, torch.full_like(change, -0.01))
        # what a row of B's change does to the weights, for inputs that A sums to 1
        moved.append(float((adapter._grid.scale * change).abs().mean()))
        groups = linear.weight.dense().unflatten(1, (-1, 32))
        steps.append(float((groups.amax(2) - groups.amin(2)).mean()) / 15)
        d, m = stored(adapter._trained)
        torch.testing.assert_close(d.log(), first[name][0].log() - 0.01 / 8, rtol=0, atol=1e-2)
        assert bool((d < first[name][0]).any())
        assert not torch.equal(m, first[name][1])
    mean = sum(steps) / len(steps)
    assert moved == pytest.approx([0.01 * 2 * step / mean for step in steps], rel=1e-5)
    assert max(steps) > 3 * min(steps)


def test_the_base_stays_dense_unless_asked_otherwise() -> None:
    table = {"model.source": "m.gguf", "data.path": "d", "method.name": "qalora"}
    assert RunConfig.from_toml(None, table).model.quant == "gguf"
    assert RunConfig.from_toml(None, table | {"method.variant": "joint"}).model.quant == "none"
    assert RunConfig.from_toml(None, table | {"method.variant": "joint", "model.quant": "nf4"}).model.quant == "nf4"
