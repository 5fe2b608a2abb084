"""Weights and configurations from disk: all layouts give the same model, and what is wrong is said, all at once."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiny_models
from ftkit import _core, adapters, models
from ftkit.errors import InputError
from ftkit.export._gguf_architecture import architecture, entries, rope_factors
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_models.peer("llama tied", torch.float32).save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    path = tmp_path / "copy"
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / name).write_bytes((saved / name).read_bytes())
    return path


def same(a: Decoder, b: Decoder) -> bool:
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logits(model: Decoder) -> torch.Tensor:
    batch = RaggedBatch.pack([[5, 80, 3, 3, 41], [7, 6]])
    with torch.no_grad():
        return model.head(model(batch))


def test_shards_are_one_model(saved: Path, tmp_path: Path) -> None:
    theirs = tiny_models.peer("llama tied", torch.float32)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = models.load(saved), models.load(tmp_path / "shards")
    assert same(whole.model, shards.model)
    assert whole.fingerprint == shards.fingerprint


def test_the_fingerprint_tells_weights_apart(saved: Path, folder: Path) -> None:
    first = models.load(saved).fingerprint
    assert models.load(folder).fingerprint == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert models.load(folder).fingerprint != first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_come_in_the_dtype_asked_for(saved: Path, dtype: torch.dtype) -> None:
    model = models.load(saved, dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = logits(models.load(saved).model)
    assert (logits(model).float() - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_all_that_is_wrong_with_weights_is_said(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        models.load(folder)
    message = str(caught.value)
    assert "model.layers.0.mlp.up_proj.weight: expected shape (53, 48), got nothing" in message
    assert "model.norm.weight: expected shape (48,), got (47,)" in message
    assert "model.layers.9.mlp.up_proj.weight: expected no such weight" in message


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    tensors["model.layers.1.mlp.down_proj.weight"][2, 2:4] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        models.load(folder)
    assert "model.norm.weight: expected finite weights, got 1 NaN and 0 infinite of 48" in str(caught.value)
    assert "model.layers.1.mlp.down_proj.weight: expected finite weights, got 0 NaN and 2" in str(caught.value)


def test_huge_finite_weights_are_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors")
    models.load(folder)


def test_a_tied_head_may_be_stored_but_not_differ(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    models.load(folder)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight: expected the embedding's values"):
        models.load(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "model_type: expected one of"),
        ({"hidden_size": "48"}, "hidden_size: expected a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected a whole number"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers: expected a whole number, at least 1 and at most 10000"),
        ({"vocab_size": None}, "vocab_size: expected a value, got none"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple of key and value heads, got 4 and 3"),
        ({"head_dim": 7}, "head_dim: expected an even number, got 7"),
        ({"hidden_act": "gelu"}, "hidden_act: expected one of silu, got 'gelu'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type: expected one of"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor: expected a positive number, got None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "factor: expected a positive number, got 'x'"),
        ({"rope_parameters": []}, None),
        ({"rope_parameters": [1]}, "rope_parameters: expected a table"),
    ],
)
def test_configurations_that_cannot_be(folder: Path, changes: dict[str, Any], expected: str | None) -> None:
    table = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(table))
    if expected is None:
        models.load(folder)
        return
    with pytest.raises(InputError) as caught:
        models.load(folder)
    assert expected in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000], ids=range(6))
def test_a_configuration_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: expected a JSON object"):
        models.load(folder)


@given(st.integers(0, 2**64 - 1), st.binary(max_size=64), st.integers(0, 200))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_safetensors_from_strangers(folder: Path, length: int, header: bytes, cut: int) -> None:
    """Header lengths of any size, headers of any bytes, files cut anywhere."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    try:
        for content in (struct.pack("<Q", length) + header, struct.pack("<Q", len(header)) + header, whole[:cut]):
            path.write_bytes(content)
            with pytest.raises(InputError):
                models.load(folder)
    finally:
        path.write_bytes(whole)


def test_an_index_names_files_beside_it(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for names, expected in (
        ({"a": "../other.safetensors"}, "expected a file in the same directory"),
        ({"a": "missing.safetensors"}, "expected the file missing.safetensors, got nothing"),
        ({"a": 3}, "expected a table 'weight_map' of file names"),
        (None, "expected a table 'weight_map' of file names"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(InputError, match=expected):
            models.load(folder)


def write_gguf(config: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A GGUF file by the core's writer, with the names and the order of rows that the family gives."""
    family = models.family_of_hf(config)
    ours = family.from_hf(config)
    laid = {family.gguf_name(name): family.to_gguf(ours, name, tensor) for name, tensor in tensors.items()}
    factors = rope_factors(ours)
    if factors is not None:
        laid["rope_freqs.weight"] = factors
    metadata = [("general.architecture", "string", architecture(ours)), *entries(ours)]
    writer = _core.GgufWriter(path, metadata, [(name, tuple(t.shape), "f32") for name, t in laid.items()])
    for name, tensor in laid.items():
        writer.write(name, tensor.float().contiguous())
    writer.finish()


@pytest.mark.parametrize(
    "variant", ["llama", "llama tied", "llama linear", "llama llama3", "mistral", "qwen2", "qwen3"]
)
def test_a_gguf_file_is_the_same_model(variant: str, tmp_path: Path) -> None:
    theirs = tiny_models.peer(variant, torch.float32)
    folder = tmp_path / "model"
    config = theirs.config.to_dict()
    if variant == "llama llama3":  # as published: GGUF keeps only the factors
        config["rope_parameters"] |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    loaded = models.load(folder)
    write_gguf(config, loaded.model.tensors(), tmp_path / "model.gguf")
    again = models.load(tmp_path / "model.gguf")
    assert again.config == loaded.config
    assert same(again.model, loaded.model)
    assert torch.equal(logits(again.model), logits(loaded.model))


@pytest.mark.parametrize("variant", ["llama", "qwen2"])  # of qwen3 it reads only heads of 128
def test_transformers_reads_that_gguf_file_as_the_same_model(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = tiny_models.ours(tiny_models.peer(variant, torch.float32), tmp_path / "model", torch.float32)
    write_gguf(loaded.hf_config(), loaded.model.tensors(), tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert all(torch.equal(theirs.state_dict()[name], tensor) for name, tensor in loaded.model.tensors().items())


def test_a_gguf_file_with_wrong_weights(tmp_path: Path) -> None:
    loaded = tiny_models.ours(tiny_models.peer("llama", torch.float32), tmp_path / "model", torch.float32)
    tensors = loaded.model.tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(3)
    write_gguf(loaded.hf_config(), tensors, tmp_path / "model.gguf")
    with pytest.raises(InputError) as caught:
        models.load(tmp_path / "model.gguf")
    assert "blk.1.ffn_up.weight: expected shape (53, 48), got nothing" in str(caught.value)
    assert "output_norm.weight: expected shape (48,), got (3,)" in str(caught.value)


def test_an_adapter_over_quantized_weights_is_refused_over_others(saved: Path, tmp_path: Path) -> None:
    held = models.load(saved, quant="int8")
    adapters.attach(held.model, "lora", {"rank": 2}, seed=0)
    adapters.save(held.model, 0, tmp_path / "adapter")
    for other in ("none", "nf4"):
        with pytest.raises(InputError, match=r"expected an adapter for this base model, .*, got one for .*\+int8"):
            adapters.load(models.load(saved, quant=other).model, tmp_path / "adapter", 0)
    adapters.load(models.load(saved, quant="int8").model, tmp_path / "adapter", 0)
