"""Models of each family, written as GGUF: transformers reads them back with the same logits."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, saved
from ftkit import adapters
from ftkit._core import GgufFile
from ftkit.errors import InputError
from ftkit.export import Material
from ftkit.export import gguf as target
from ftkit.models import LoadedModel, load

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    material, model = saved(tmp_path, family)
    target.write(material, tmp_path / "model.gguf", "f32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert ("output.weight" in names) == (family != "llama-tied")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_the_models_own_bits(family: str, tmp_path: Path) -> None:
    material, _ = saved(tmp_path, family)
    target.write(material, tmp_path / "model.gguf", "f32")
    read = load(tmp_path / "model.gguf")
    assert read.config == material.loaded.config
    tensors = read.model.tensors()
    assert tensors.keys() == material.tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in material.tensors.items())


@pytest.mark.parametrize("kind", ["q8_0", "q4_1", "q4_k_m"])
def test_quantized_weights_are_near_and_read_alike_everywhere(kind: str, tmp_path: Path) -> None:
    material, _ = saved(tmp_path, "qwen2")
    remarks = target.write(material, tmp_path / "model.gguf", kind)
    assert bool(remarks) == (kind == "q4_k_m")  # its blocks are longer than these rows
    ours = GgufFile(tmp_path / "model.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        values = torch.empty(tuple(int(size) for size in reversed(tensor.shape)))
        ours.read(tensor.name, values)
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values.numpy(), theirs.reshape(values.shape))
    down = torch.empty(64, 96)
    ours.read("blk.1.ffn_down.weight", down)
    original = material.tensors["model.layers.1.mlp.down_proj.weight"]
    assert 0 < (down - original).norm() / original.norm() < (0.01 if kind == "q8_0" else 0.1)


@pytest.fixture(scope="module")
def real(smollm2: Path) -> LoadedModel:
    return load(smollm2)


def test_a_gguf_file_exported_to_its_own_type_gives_the_same_bits(real: LoadedModel, tmp_path: Path) -> None:
    target.write(Material.of(real), tmp_path / "again.gguf", "source")
    first, second = GgufFile(real.path), GgufFile(tmp_path / "again.gguf")
    assert first.metadata == second.metadata
    assert first.metadata_types == second.metadata_types
    assert sorted(first.tensors) == sorted(second.tensors)
    assert different_tensors(real.path, tmp_path / "again.gguf") == []


def test_an_adapted_weight_is_quantized_anew_and_no_other(real: LoadedModel, tmp_path: Path) -> None:
    name = "model.layers.7.self_attn.q_proj"
    adapters.attach(real.model, "lora", {"target_modules": [name], "rank": 4}, seed=1)
    try:
        for parameter in adapters.trainable(real.model).values():
            torch.nn.init.normal_(parameter, std=0.05)
        material = Material.of(real, 0)
        assert material.changed == {f"{name}.weight"}
        target.write(material, tmp_path / "changed.gguf", "q4_1")
    finally:
        adapters.detach(real.model, 0)
    assert different_tensors(real.path, tmp_path / "changed.gguf") == ["blk.7.attn_q.weight"]
    read = load(tmp_path / "changed.gguf").model.tensors()[f"{name}.weight"]
    wanted = material.tensors[f"{name}.weight"]
    assert (read - wanted).norm() / wanted.norm() < 0.08 < (real.model.tensors()[f"{name}.weight"] - wanted).norm()


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors whose blocks differ."""
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(one).tensors}
    return [
        tensor.name for tensor in gguf.GGUFReader(other).tensors if not np.array_equal(tensor.data, theirs[tensor.name])
    ]


def test_the_type_of_the_source_needs_a_gguf_source(tmp_path: Path) -> None:
    material, _ = saved(tmp_path, "qwen2")
    with pytest.raises(InputError, match="--type source: expected a model from a GGUF file"):
        target.write(material, tmp_path / "model.gguf", "source")
    assert not (tmp_path / "model.gguf").exists()
