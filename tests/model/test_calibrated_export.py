"""Calibration on the real model: its statistics are transformers', and coarse types lose less with it.

Texts are Python's own language reference: half of its pages to calibrate on, others to measure.
"""

import math
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ftkit import _core, models
from ftkit.export import _gguf_types
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.calibration import InputStatistics, input_statistics
from ftkit.nn.linear import DenseWeight

pytestmark = pytest.mark.model

SIZES = {name: (size, nbytes) for name, size, nbytes in _core.quant_formats()}
LAYERS = 30
ROUNDED = range(1, LAYERS, 8)
"""The layers that are rounded: enough to show, few enough to be quick."""


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return models.load(smollm2)


def rows(loaded: LoadedModel, half: int, tokens: int = 100) -> list[list[int]]:
    """The beginnings of long pages; the two halves share none."""
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items())][half::2]
    return [ids[:tokens] for page in pages if len(ids := loaded.tokenizer.encode(page)) >= 200][:8]


@pytest.fixture(scope="module")
def statistics(loaded: LoadedModel) -> dict[str, InputStatistics]:
    return input_statistics(loaded.model, (RaggedBatch.pack([row]) for row in rows(loaded, 0)))


def test_statistics_are_those_of_transformers_layers(loaded: LoadedModel, peer: Any) -> None:
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0][0].double()}))
        for name, layer in peer.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    row = rows(loaded, 1, 200)[0]
    with torch.no_grad():
        peer(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    found = input_statistics(loaded.model, [RaggedBatch.pack([row])])
    assert found.keys() == seen.keys()
    for name, x in seen.items():
        for ours, expected in ((found[name].mean, x.mean(0)), (found[name].second_moment, x.square().mean(0))):
            # forward passes in float32 part by about 1e-6 of the largest input
            assert (ours - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), name


@pytest.fixture
def whole(loaded: LoadedModel) -> Iterator[dict[str, Tensor]]:
    """The matrices of the layers that are rounded; they are put back after the test."""
    linears = loaded.model.linears()
    kept = {
        f"model.layers.{layer}.{part}": weight.tensor.detach().clone()
        for layer in ROUNDED
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        if isinstance(weight := linears[f"model.layers.{layer}.{part}"].weight, DenseWeight)
    }  # fmt: skip
    assert len(kept) == 7 * len(ROUNDED)
    yield kept
    for name, tensor in kept.items():
        put(loaded, name, tensor)


@pytest.fixture(scope="module")
def exact(loaded: LoadedModel) -> float:
    return perplexity(loaded)


def put(loaded: LoadedModel, name: str, tensor: Tensor) -> None:
    weight = loaded.model.linears()[name].weight
    assert isinstance(weight, DenseWeight)
    with torch.no_grad():
        weight.tensor.copy_(tensor)


def perplexity(loaded: LoadedModel) -> float:
    loss, count = 0.0, 0
    with torch.inference_mode():
        for row in rows(loaded, 1):
            logs = loaded.model.head(loaded.model(RaggedBatch.pack([row]))[:-1]).double().log_softmax(-1)
            loss -= float(logs.gather(1, torch.tensor(row[1:]).unsqueeze(1)).sum())
            count += len(row) - 1
    return math.exp(loss / count)


@pytest.mark.parametrize("kind", ["q4_k_m", "iq4_nl", "q3_k_m", "q2_k"])
def test_perplexity_is_lower_with_calibration(
    loaded: LoadedModel, exact: float, statistics: dict[str, InputStatistics], whole: dict[str, Tensor], kind: str
) -> None:
    found: list[float] = []
    errors: dict[str, list[float]] = {name: [] for name in whole}
    for calibrated in (False, True):
        for name, values in whole.items():
            gguf_name = models.family(loaded.config.family).gguf_name(f"{name}.weight")
            form = _gguf_types.block_format(gguf_name, tuple(values.shape), LAYERS, _gguf_types.mixture(kind))
            size, nbytes = SIZES[form]
            blocks, restored = torch.empty(values.numel() // size * nbytes, dtype=torch.uint8), torch.empty_like(values)
            importance = statistics[name].second_moment
            _core.quantize(form, values, blocks, importance.float() if calibrated else None)
            _core.dequantize(form, blocks, restored)
            errors[name].append(float(((restored - values).double().square() * importance).sum()))
            put(loaded, name, restored)
        found.append(perplexity(loaded))
    print(f"{kind}: perplexity {exact:.3f} before rounding, {found[0]:.3f} rounded, {found[1]:.3f} calibrated")
    assert found[1] <= found[0]
    assert all(calibrated <= plain for plain, calibrated in errors.values())
