"""Directories of safetensors that transformers loads, whole, sharded and tied."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ftkit.errors import InputError
from ftkit.export import Material
from ftkit.export import safetensors as target

pytestmark = pytest.mark.unit

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def material(folder: Path, tied: bool) -> tuple[Material, PreTrainedModel]:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    folder.mkdir()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not a part of a model")
    config_json = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    return Material(path=folder, config=config_json, tensors=model.state_dict()), model


@pytest.mark.parametrize("kind", target.TYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10_000, 10**9])
def test_transformers_loads_the_same_model(
    kind: str, tied: bool, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "SHARD_BYTES", shard_bytes)
    exported, model = material(tmp_path / "from", tied)
    out = tmp_path / "to"
    out.mkdir()
    target.write(exported, out, kind)
    read, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert read.dtype == DTYPES[kind]
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor.to(DTYPES[kind])), name
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert (len(shards) > 3) == (shard_bytes == 10_000)
    names = [name for shard in shards for name in safe_open(out / shard, "pt").keys()]  # noqa: SIM118
    assert sorted(names) == sorted(name for name in model.state_dict() if not (tied and name == "lm_head.weight"))
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "notes.txt").exists()


def test_weights_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    exported, _ = material(tmp_path / "from", False)
    exported.tensors["model.norm.weight"][3] = 70_000
    with pytest.raises(
        InputError, match=r"model\.norm\.weight: expected finite weights of at most 65504 for f16, got 70000"
    ):
        target.write(exported, tmp_path, "f16")


def test_a_type_of_another_target_is_refused(tmp_path: Path) -> None:
    exported, _ = material(tmp_path / "from", False)
    with pytest.raises(InputError, match="expected one of bf16, f16, f32 for safetensors, got 'q4_0'"):
        target.write(exported, tmp_path, "q4_0")
