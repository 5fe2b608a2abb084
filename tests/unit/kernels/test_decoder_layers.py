"""All layers in one call: what the layers one by one compute, to the bit the same in any company."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from ftkit import adapters
from ftkit.kernels import decoder_layers as module
from ftkit.kernels.decoder_layers import decoder_layers
from ftkit.kernels.next_logits import next_logits
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.nn.paged_cache import PagedCache
from ftkit.quant.gguf import GgufWeight

pytestmark = pytest.mark.unit

LENGTHS = (7, 1, 12, 1, 3)
BLOCK = 4


def cache_for(model: Decoder) -> PagedCache:
    config = model.config
    cache = PagedCache(
        layers=config.layers,
        key_value_heads=config.key_value_heads,
        head_dim=config.head_dim,
        page_count=40,
        block_tokens=BLOCK,
    )
    cache.pool.zero_()
    return cache


def tables(sequences: list[int]) -> Tensor:
    """Pages that belong to the numbered sequences alone: 8 each, in an order of their own."""
    rows = [torch.randperm(8, generator=torch.Generator().manual_seed(n)) + 8 * n for n in sequences]
    return torch.stack(rows).int()


def steps(model: Decoder, chosen: list[int], adapter: list[int]) -> tuple[list[Tensor], Tensor]:
    """The hidden states of the chosen sequences in a prompt and two tokens more, and the cache after it."""
    cache, found = cache_for(model), []
    starts = [0] * len(chosen)
    for step in range(3):
        counts = [LENGTHS[n] if step == 0 else 1 for n in chosen]
        tokens = [
            [(31 * n + 7 * (start + i)) % 97 for i in range(count)]
            for n, start, count in zip(chosen, starts, counts, strict=True)
        ]
        batch = RaggedBatch.pack(tokens, adapter=[adapter[n] for n in chosen], starts=starts)
        object.__setattr__(batch, "block_table", tables(chosen))
        with torch.inference_mode():
            found.append(model(batch, cache))
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return found, cache.pages


def model_of(variant: str, folder: Path, loras: int = 0) -> LoadedModel:
    loaded = tiny_models.ours(tiny_models.peer(variant, torch.float32), folder, torch.float32)
    for number in range(loras):
        adapters.attach(loaded.model, "lora", {"rank": 3 + number, "alpha": 5.0}, seed=number, adapter_id=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapters.trainable(loaded.model, number).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    loaded.model.eval()
    return loaded


def is_fused(model: Decoder) -> bool:
    """Whether the core computes all of its adapters together."""
    return module.fused_layers(model) is not None and not model._fused.left_out  # type: ignore[union-attr]


@pytest.mark.parametrize("loras", [0, 2])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_equals_the_layers_one_by_one(
    variant: str, loras: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(variant, tmp_path, loras).model
    assert is_fused(model)
    adapter = [0, -1, 1, 0, 1] if loras else [-1] * 5
    fused, kept = steps(model, [0, 1, 2, 3, 4], adapter)
    monkeypatch.setenv("FTKIT_KERNELS", "reference")
    expected, kept_by_reference = steps(model, [0, 1, 2, 3, 4], adapter)
    for ours, reference in zip(fused, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-4, atol=2e-5)  # float32, sums of about 50 in another order
    torch.testing.assert_close(kept, kept_by_reference, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("loras", [0, 2])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_a_whole_step_gives_the_logits_of_its_rows(
    variant: str, loras: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(variant, tmp_path, loras).model
    adapter = [0, -1, 1, 0, 1] if loras else [-1] * 5
    batch = RaggedBatch.pack([[(31 * n + 7 * i) % 97 for i in range(count)] for n, count in enumerate(LENGTHS)])
    batch = dataclasses.replace(
        batch, adapter=torch.tensor(adapter), host_adapter=tuple(adapter), block_table=tables([0, 1, 2, 3, 4])
    )
    found = []
    for pin in ("", "reference"):
        monkeypatch.setenv("FTKIT_KERNELS", pin)
        for rows in ([6, 7, 8, 19, 21], list(range(sum(LENGTHS))), []):
            with torch.inference_mode():
                found.append(next_logits(batch, torch.tensor(rows, dtype=torch.int32), cache_for(model), model))
    for ours, reference in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-4, atol=2e-4)  # as above, and a sum over the width more
    assert torch.equal(found[0], found[1][[6, 7, 8, 19, 21]])


@pytest.mark.parametrize("variant", ["llama biases", "qwen3 windows"])
def test_a_sequence_is_the_same_bits_in_any_company(variant: str, tmp_path: Path) -> None:
    model = model_of(variant, tmp_path, 2).model
    adapter = [0, -1, 1, 0, 1]
    together, _ = steps(model, [0, 1, 2, 3, 4], adapter)
    ends = [list(itertools.accumulate([0, *LENGTHS])), list(range(6)), list(range(6))]
    for n in range(5):
        alone, _ = steps(model, [n], adapter)
        for step in range(3):
            assert torch.equal(alone[step], together[step][ends[step][n] : ends[step][n + 1]])


def test_a_changed_model_is_seen(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path, 2).model
    adapter = [0, -1, 1, 0, 1]
    before, _ = steps(model, [0, 1], adapter)
    with torch.no_grad():  # in place, as training does
        next(iter(adapters.trainable(model, 0).values())).mul_(3)
    trained, _ = steps(model, [0, 1], adapter)
    assert not torch.equal(before[0][:7], trained[0][:7])
    assert torch.equal(before[0][7:], trained[0][7:])
    layer: Any = model.layers[0]
    layer.mlp.up_proj.weight = layer.mlp.up_proj.weight.replace_dense(layer.mlp.up_proj.weight.dense() * 2)
    replaced, _ = steps(model, [0, 1], adapter)
    assert not torch.equal(trained[0][7:], replaced[0][7:])
    adapters.detach(model, 0)
    base, _ = steps(model, [0, 1], [-1] * 5)
    without, _ = steps(model, [0, 1], adapter)
    assert torch.equal(base[0], without[0])


def test_what_the_core_does_not_know_goes_one_by_one(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path).model
    assert decoder_layers.backends == ["fused", "reference"]
    adapters.attach(model, "lora", {"rank": 2, "modules_to_save": ["norm"]}, seed=0, adapter_id=0)
    model.eval()
    if any(norm.adapters for norm in (model.layers[0].input_layernorm,)):  # type: ignore[union-attr]
        assert not is_fused(model)
    adapters.detach(model, 0)
    assert is_fused(model)
    half = tiny_models.ours(tiny_models.peer("llama", torch.float32), tmp_path / "half", torch.bfloat16).model
    assert not is_fused(half)


def test_an_adapter_that_moves_blocks_is_computed_apart_and_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tiny_models.peer("llama biases", torch.float32, sizes=tiny_models.GROUPED)
    model = tiny_models.ours(theirs, tmp_path, torch.float32).model
    for name, linear in model.linears().items():
        if name != "lm_head":
            empty = torch.zeros(linear.shape[0], linear.shape[1] // 32 * 20, dtype=torch.uint8)
            linear.weight = GgufWeight(empty, "q4_1", torch.float32).replace_dense(linear.weight.dense())
    for number, method in enumerate(("qalora", "lora", "qalora")):
        adapters.attach(model, method, {}, seed=number, adapter_id=number)
        generator = torch.Generator().manual_seed(number)
        for parameter in adapters.trainable(model, number).values():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    model.eval()
    adapter = [0, -1, 1, 0, 2]
    assert not is_fused(model)
    assert module.fused_layers(model, 0) is None, "what is trained changes in place"
    for number in (0, 2):
        for parameter in adapters.trainable(model, number).values():
            parameter.requires_grad_(False)
    adapters.attach(model, "lora", {}, seed=0, adapter_id=3)  # a change, so that the core's view is made anew
    together, kept = steps(model, [0, 1, 2, 3, 4], adapter)
    assert all(module.fused_layers(model, number) is not None for number in (-1, 0, 1, 2))
    ends = [list(itertools.accumulate([0, *LENGTHS])), list(range(6)), list(range(6))]
    for n in range(5):
        alone, _ = steps(model, [n], adapter)
        for step in range(3):
            assert torch.equal(alone[step], together[step][ends[step][n] : ends[step][n + 1]])
    monkeypatch.setenv("FTKIT_KERNELS", "reference")
    expected, kept_by_reference = steps(model, [0, 1, 2, 3, 4], adapter)
    for ours, reference in zip(together, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(kept, kept_by_reference, rtol=2e-4, atol=2e-5)
    base, _ = steps(model, [0, 1], [-1] * 5)
    assert (base[0][:7] - expected[0][:7]).abs().max() > 0.1
