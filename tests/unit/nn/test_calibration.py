"""The calibration pass: statistics of what goes into each layer, as transformers' layers see it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from ftkit import adapters, models
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.calibration import InputStatistics, input_statistics
from ftkit.nn.decoder import Decoder

pytestmark = pytest.mark.unit

ROWS = [
    torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (13, 1, 7, 19)
]


def by_hand(theirs: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """All inputs [T, in] of transformers' linear layers, by name."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, __, name=name: seen.setdefault(name, []).append(inputs[0][0]))
        for name, layer in theirs.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    with torch.no_grad():
        for row in rows:
            theirs(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


def assert_equal(found: dict[str, InputStatistics], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].tokens == len(x)
        for ours, theirs in ((found[name].mean, x.mean(0)), (found[name].second_moment, x.square().mean(0))):
            assert ours.dtype == torch.float64
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), name


@pytest.mark.parametrize("variant", ["llama", "llama tied", "qwen3 biases"])
def test_statistics_are_those_of_transformers_layers(variant: str, tmp_path: Path) -> None:
    theirs = tiny_models.peer(variant, torch.float32)
    model = tiny_models.ours(theirs, tmp_path, torch.float32).model
    assert_equal(input_statistics(model, [RaggedBatch.pack(ROWS)]), by_hand(theirs, ROWS), 1e-5)


def test_packed_is_one_by_one(tmp_path: Path) -> None:
    model = tiny_models.ours(tiny_models.peer("llama"), tmp_path).model
    told: list[int] = []
    packed = input_statistics(model, [RaggedBatch.pack(ROWS)], told.append)
    single = input_statistics(model, [RaggedBatch.pack([row]) for row in ROWS], told.append)
    assert told == [40, 13, 14, 21, 40]
    for name, each in packed.items():
        assert each.tokens == single[name].tokens == 40
        torch.testing.assert_close(each.mean, single[name].mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each.second_moment, single[name].second_moment, rtol=1e-12, atol=1e-12)


def test_an_adapters_inputs_are_those_of_the_merged_model(tmp_path: Path) -> None:
    theirs = tiny_models.peer("llama")
    model = tiny_models.ours(theirs, tmp_path).model
    adapters.attach(model, "lora", {"rank": 3}, seed=1)
    for parameter in adapters.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    base = input_statistics(model, [RaggedBatch.pack(ROWS)])
    under = input_statistics(model, [RaggedBatch.pack(ROWS, adapter=0)])
    assert_equal(base, by_hand(theirs, ROWS), 1e-9)
    theirs.load_state_dict(adapters.merged(model, 0))
    assert_equal(under, by_hand(theirs, ROWS), 1e-6)  # the adapter's matrices are float32


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantized_bases_inputs_are_those_of_its_dense_twin(scheme: str, tmp_path: Path) -> None:
    theirs = tiny_models.peer("llama", torch.float32, sizes=tiny_models.GROUPED)
    theirs.save_pretrained(tmp_path)
    model = models.load(tmp_path, quant=scheme).model
    found = input_statistics(model, [RaggedBatch.pack(ROWS)])
    theirs.load_state_dict(model.tensors())
    assert_equal(found, by_hand(theirs, ROWS), 1e-5)


def test_nothing_stays_behind(tmp_path: Path) -> None:
    model: Decoder = tiny_models.ours(tiny_models.peer("llama"), tmp_path).model

    def broken() -> Any:
        yield RaggedBatch.pack(ROWS)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        input_statistics(model, broken())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert input_statistics(model, []) == {}
