"""Models of each family, written as GGUF: transformers reads them back with the same logits."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ftkit._core import GgufFile
from ftkit.errors import InputError
from ftkit.export import Material
from ftkit.export import gguf as target

pytestmark = pytest.mark.unit

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 777.0})),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=128)),
}


def material(folder: Path, family: str) -> tuple[Material, PreTrainedModel]:
    """A random model of the family, saved with a tokenizer to `folder`."""
    torch.manual_seed(5)
    build, config = FAMILIES[family]
    model = build(config).eval()
    for parameter in model.parameters():  # norms and biases too: their defaults would hide a mix-up
        torch.nn.init.normal_(parameter, mean=0.1, std=0.2)
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: SHAPE["vocab_size"] - 3]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    read = json.loads((folder / "config.json").read_text())
    return Material(path=folder, config=read, tensors=model.state_dict(), template="{{ messages }}"), model


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    exported, model = material(tmp_path, family)
    target.write(exported, tmp_path / "model.gguf", "f32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert ("output.weight" in names) == (family != "llama-tied")


@pytest.mark.parametrize("kind", ["q8_0", "q4_1", "q4_k_m"])
def test_quantized_weights_are_near_and_read_alike_everywhere(kind: str, tmp_path: Path) -> None:
    exported, _ = material(tmp_path, "qwen2")
    remarks = target.write(exported, tmp_path / "model.gguf", kind)
    assert bool(remarks) == (kind == "q4_k_m")  # its blocks are longer than these rows
    ours = GgufFile(tmp_path / "model.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        values = torch.empty(tuple(int(size) for size in reversed(tensor.shape)))
        ours.read(tensor.name, values)
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values.numpy(), theirs.reshape(values.shape))
    down = torch.empty(64, 96)
    ours.read("blk.1.ffn_down.weight", down)
    original = exported.tensors["model.layers.1.mlp.down_proj.weight"]
    assert 0 < (down - original).norm() / original.norm() < (0.01 if kind == "q8_0" else 0.1)


def test_a_gguf_file_exported_to_its_own_type_gives_the_same_bits(
    real: Material, smollm2: Path, tmp_path: Path
) -> None:
    target.write(real, tmp_path / "again.gguf", "source")
    first, second = GgufFile(smollm2), GgufFile(tmp_path / "again.gguf")
    assert first.metadata == second.metadata
    assert first.metadata_types == second.metadata_types
    assert sorted(first.tensors) == sorted(second.tensors)
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(smollm2).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "again.gguf").tensors:
        assert np.array_equal(tensor.data, theirs[tensor.name])


def test_a_changed_weight_is_quantized_anew_and_no_other(real: Material, smollm2: Path, tmp_path: Path) -> None:
    name = "model.layers.7.self_attn.q_proj.weight"
    changed = {**real.tensors, name: real.tensors[name] * 2}
    target.write(
        Material(path=smollm2, config=real.config, tensors=changed, changed=frozenset({name})),
        tmp_path / "changed.gguf",
        "q4_1",
    )
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(smollm2).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "changed.gguf").tensors:
        assert np.array_equal(tensor.data, theirs[tensor.name]) == (tensor.name != "blk.7.attn_q.weight")
    doubled, original = (torch.empty(576, 576) for _ in range(2))
    GgufFile(tmp_path / "changed.gguf").read("blk.7.attn_q.weight", doubled)
    GgufFile(smollm2).read("blk.7.attn_q.weight", original)
    assert (doubled - 2 * original).norm() / doubled.norm() < 0.02


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Material:
    """The real model's weights by Hugging Face's names, as transformers reads them."""
    path = smollm2
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return Material(
        path=path, config=json.loads(model.config.to_json_string(use_diff=False)), tensors=model.state_dict()
    )


def test_what_gguf_has_no_name_for_is_refused(tmp_path: Path) -> None:
    exported, _ = material(tmp_path, "qwen2")
    odd = Material(
        path=tmp_path, config=exported.config, tensors={**exported.tensors, "model.extra.weight": torch.zeros(2)}
    )
    with pytest.raises(InputError, match=r"expected a weight that GGUF has a name for, got 'model\.extra\.weight'"):
        target.write(odd, tmp_path / "model.gguf", "f16")
    with pytest.raises(InputError, match="--type source: expected a model from a GGUF file"):
        target.write(exported, tmp_path / "model.gguf", "source")
    assert not (tmp_path / "model.gguf").exists()
