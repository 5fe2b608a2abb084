"""Every family computes what transformers computes: logits, and the gradient of every weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import tiny_models
from ftkit import adapters, models
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import sft

pytestmark = pytest.mark.unit

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def rows(seed: int, lengths: tuple[int, ...] = (13, 1, 7, 19)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Within the tolerance of the dtype, relative to the largest value."""
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)
    assert error <= TOLERANCE[dtype], f"{what}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_logits_and_gradients_equal_transformers(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = tiny_models.peer(variant, dtype)
    model = tiny_models.ours(theirs, tmp_path / "model", dtype).model
    adapters.attach(model, "full", {}, seed=0)
    sequences = rows(1)
    targets = [[*row[1:], -100] for row in sequences]
    batch = RaggedBatch.pack(sequences, targets=targets, adapter=0)

    parts = sft.loss(model, batch)
    parts.sum.sum().backward()
    logits = model.head(model(batch), batch.routes).detach()
    expected = []
    for row, wanted in zip(sequences, targets, strict=True):
        found = theirs(torch.tensor([row])).logits[0]
        functional.cross_entropy(found, torch.tensor(wanted), reduction="sum", ignore_index=-100).backward()
        expected.append(found.detach())

    close(logits, torch.cat(expected), dtype, "logits")
    assert parts.count.item() == sum(len(row) - 1 for row in sequences)
    parameters = adapters.trainable(model)
    wanted_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(parameters) == set(wanted_gradients)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        close(parameter.grad, wanted_gradients[name], dtype, name)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_configuration_survives_a_round_trip(variant: str) -> None:
    config: Any = tiny_models.peer(variant).config
    ours = models.family_of_hf(config.to_dict()).from_hf(config.to_dict())
    table = models.family(ours.family).to_hf(ours)
    again = models.family_of_hf(table).from_hf(table)
    assert again == ours
