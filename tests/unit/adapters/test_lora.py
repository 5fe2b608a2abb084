"""LoRA's options, and what of PEFT's is refused because it would be computed differently here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from ftkit import adapters, models
from ftkit.errors import InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.peer("llama tied", torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> Decoder:
    return models.load(folder).model


def layers(model: Decoder) -> set[str]:
    return {name.rpartition(".")[0] for name in adapters.trainable(model)}


@pytest.mark.parametrize(
    ("options", "count", "example"),
    [
        ({}, 21, "model.layers.0.self_attn.q_proj"),
        ({"target_modules": ("q_proj", "lm_head")}, 4, "lm_head"),
        ({"target_modules": r".*\.[02]\.mlp\..*"}, 6, "model.layers.2.mlp.up_proj"),
        ({"exclude_modules": ("mlp.up_proj",)}, 18, "model.layers.1.mlp.down_proj"),
        ({"target_modules": ("q_proj",), "modules_to_save": ("model.norm", "embed_tokens")}, 5, "model.embed_tokens"),
        ({"modules_to_save": ("k_proj",)}, 21, "model.layers.0.self_attn.k_proj"),
    ],
)
def test_targets(model: Decoder, options: dict[str, Any], count: int, example: str) -> None:
    adapters.attach(model, "lora", options, seed=0)
    assert len(layers(model)) == count
    assert example in layers(model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ("q_prj",)}, "did you mean 'q_proj'"),
        ({"target_modules": ()}, "target_modules: expected names of layers, got none"),
        ({"target_modules": "nothing.*"}, "which matches none"),
        ({"target_modules": "("}, "target_modules: expected a regular expression"),
        ({"modules_to_save": ("embed_token",)}, "did you mean 'embed_tokens'"),
        ({"rank": 0}, "rank: expected an integer, at least 1 and at most 65536, got 0"),
        ({"dropout": 1.0}, "dropout: expected a number"),
        ({"rank_pattern": {"q_proj": 0}}, "expected positive ranks and alphas"),
        ({"rank_pattern": {"(": 2}}, "expected names, got '('"),
        ({"target_modules": ("lm_head",), "modules_to_save": ("embed_tokens",)}, "through tied embeddings"),
    ],
)
def test_options_that_cannot_be(model: Decoder, options: dict[str, Any], expected: str) -> None:
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError) as caught:
        adapters.attach(model, "lora", options, seed=0)
    assert expected in str(caught.value)
    assert [name for name, _ in model.named_parameters()] == before
    adapters.attach(model, "lora", {}, seed=0)


def test_scale(model: Decoder) -> None:
    options = {"rank": 9, "alpha": 6.0, "rank_pattern": {"up_proj": 4}, "alpha_pattern": {"layers.1.mlp.up_proj": 2.0}}
    for adapter_id, rslora in enumerate((False, True)):
        adapters.attach(model, "lora", {**options, "rslora": rslora}, seed=0, adapter_id=adapter_id)
        for name, rank, alpha in (("0.mlp.down_proj", 9, 6), ("0.mlp.up_proj", 4, 6), ("1.mlp.up_proj", 4, 2)):
            adapter: Any = model.linears()[f"model.layers.{name}"].adapter(adapter_id)
            assert adapter.lora_A.shape[0] == rank
            assert adapter.scale == pytest.approx(alpha / (math.sqrt(rank) if rslora else rank))


def test_a_layers_first_values_do_not_depend_on_the_other_targets(model: Decoder) -> None:
    adapters.attach(model, "lora", {}, seed=0, adapter_id=0)
    adapters.attach(model, "lora", {"target_modules": ("v_proj",)}, seed=0, adapter_id=1)
    every, some = adapters.trainable(model, 0), adapters.trainable(model, 1)
    assert len(some) == 6
    assert all(torch.equal(every[name], parameter) for name, parameter in some.items())
    a = every["model.layers.0.mlp.down_proj.lora_A"]
    assert a.abs().max() <= 1 / math.sqrt(53)
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 53), rel=0.1)


def test_dropout_works_in_training_only_and_repeats_with_its_seed(model: Decoder) -> None:
    adapters.attach(model, "lora", {"dropout": 0.5}, seed=0)
    with torch.no_grad():
        for parameter in adapters.trainable(model).values():
            parameter += 0.1
    batch = RaggedBatch.pack([[1, 2, 3, 4]], adapter=0)
    mixed = RaggedBatch.pack([[1, 2, 3, 4], [5]], adapter=[0, -1])
    with torch.no_grad():
        still = model(batch)
        assert torch.equal(model(batch), still)
        model.train()
        for each in (batch, mixed):
            outputs = []
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                outputs.append(model(each)[:4])
            assert torch.equal(outputs[0], outputs[1])
            assert not torch.equal(outputs[0], outputs[2])
            assert not torch.allclose(outputs[0], still)


def test_a_bfloat16_model_trains_float32_matrices(folder: Path) -> None:
    model = models.load(folder, dtype=torch.bfloat16).model
    adapters.attach(model, "lora", {}, seed=0)
    assert {parameter.dtype for parameter in adapters.trainable(model).values()} == {torch.float32}
    hidden = model(RaggedBatch.pack([[1, 2, 3]], adapter=0))
    assert hidden.dtype == torch.bfloat16
    hidden.sum().backward()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dora": True}, "use_dora: expected it unset, got True"),
        ({"bias": "all"}, "bias: expected 'none', got 'all'"),
        ({"fan_in_fan_out": True, "layers_to_transform": [1]}, "layers_to_transform: expected None, got [1]"),
        ({"init_lora_weights": "pissa_niter_4"}, "expected one that leaves the base as it is"),
        ({"peft_type": "LOHA"}, "expected peft_type 'LORA', got 'LOHA'"),
        ({"r": "x"}, "rank: expected an integer"),
    ],
)
def test_what_peft_would_compute_differently_is_refused(
    model: Decoder, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    adapters.attach(model, "lora", {}, seed=0)
    adapters.save(model, 0, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError) as caught:
        adapters.load(model, tmp_path / "adapter", 1)
    assert expected in str(caught.value)


def test_directories_that_are_no_adapters(model: Decoder, tmp_path: Path) -> None:
    adapters.attach(model, "lora", {}, seed=0)
    adapters.save(model, 0, tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    for name, expected in (("nothing", "got nothing"), ("empty", "got neither")):
        with pytest.raises(InputError, match=expected):
            adapters.load(model, tmp_path / name, 1)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    for content in (b"", weights.read_bytes()[:-9], b"\xff" * 99):
        weights.write_bytes(content)
        with pytest.raises(InputError, match="expected a safetensors file"):
            adapters.load(model, tmp_path / "adapter", 1)
    weights.unlink()
    with pytest.raises(InputError, match=r"expected adapter_model\.safetensors, got nothing"):
        adapters.load(model, tmp_path / "adapter", 1)


def test_ids(model: Decoder) -> None:
    adapters.attach(model, "lora", {}, seed=0, adapter_id=4)
    with pytest.raises(InputError, match="expected a free one, got 4"):
        adapters.attach(model, "lora", {}, seed=0, adapter_id=4)
    for call in (adapters.trainable, adapters.detach, adapters.merged):
        with pytest.raises(InputError, match=r"expected one of this model \(4\), got 2"):
            call(model, 2)
    with pytest.raises(InputError, match="did you mean 'lora'"):
        adapters.attach(model, "lorra", {}, seed=0)


def test_no_backward_below_the_lowest_trained_layer(model: Decoder) -> None:
    """What comes before the first adapter needs no gradient, and so keeps nothing."""
    adapters.attach(model, "lora", {"target_modules": r".*layers\.2\..*"}, seed=0)
    needs: list[bool] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, output: needs.append(output.requires_grad))
    model(RaggedBatch.pack([[1, 2, 3]], adapter=0))
    assert needs == [False, False, True]
