"""An adapter as a GGUF LoRA file: its structure by the `gguf` package, and what llama.cpp answers with it."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from families import FAMILIES, saved
from ftkit import adapters
from ftkit.engine.llama_cpp import open_model
from ftkit.errors import GateError, InputError
from ftkit.export import Material, export, gguf_lora
from ftkit.export import gguf as gguf_target
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch

TOKENS = list(range(3, 40))
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4},
    "rslora": {"rank": 4, "rslora": True},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 5.0}},
    "some": {"rank": 4, "target_modules": ("k_proj", "up_proj")},
}


def adapted(loaded: LoadedModel, options: dict[str, Any], method: str = "lora") -> LoadedModel:
    """The model with an adapter that changes what it says."""
    adapters.attach(loaded.model, method, options, seed=1)
    torch.manual_seed(3)
    for parameter in adapters.trainable(loaded.model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    loaded.model.eval()
    return loaded


def logits(loaded: LoadedModel, adapter: int) -> Tensor:
    batch = RaggedBatch.pack([TOKENS], adapter=adapter)
    with torch.inference_mode():
        return loaded.model.head(loaded.model(batch), batch.routes)


@pytest.mark.unit
@pytest.mark.parametrize("options", METHODS)
def test_the_file_is_laid_out_as_llama_cpp_reads_it(options: str, tmp_path: Path) -> None:
    loaded = adapted(saved(tmp_path, "qwen2")[0].loaded, METHODS[options])
    remarks = gguf_lora.write(Material.of(loaded, 0), tmp_path / "a.gguf", "f32")
    assert bool(remarks) == (options == "patterns")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert os.sep not in fields["general.name"]  # where the model lies is nobody's business
    assert fields["general.architecture"] == "qwen2"
    assert fields["adapter.type"] == "lora"
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    names = dict(gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 3).mapping)
    count = 0
    for name, linear in loaded.model.linears().items():
        if "0" not in linear.adapters:
            continue
        count += 1
        stem = f"{names[name][1]}.weight"
        a, b = tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]
        lora = linear.adapters["0"]
        assert torch.equal(a, lora.lora_A)  # Qwen's rows keep their order
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        torch.testing.assert_close(scale * b, lora.scale * lora.lora_B, rtol=1e-6, atol=0)
    assert len(tensors) == 2 * count


@pytest.mark.unit
@pytest.mark.parametrize("kind", gguf_lora.TYPES)
def test_the_command_reads_it_back_and_compares(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = adapted(saved(tmp_path / "base", "llama")[0].loaded, METHODS["patterns"])
    adapters.save(loaded.model, 0, tmp_path / "adapter")
    out = tmp_path / "a.gguf"
    result = export(str(tmp_path / "base"), out, to="gguf-lora", kind=kind, adapter=tmp_path / "adapter")
    assert result.parity.kl_mean < {"f32": 1e-12, "f16": 1e-5, "bf16": 1e-3}[kind]
    assert result.bytes == out.stat().st_size
    monkeypatch.setattr(gguf_lora, "_loras", lambda model, _: {n: (a, b, 2 * s) for n, (a, b, s) in found(model)})
    with pytest.raises(GateError):
        export(str(tmp_path / "base"), tmp_path / "b.gguf", to="gguf_lora", kind=kind, adapter=tmp_path / "adapter")
    assert not (tmp_path / "b.gguf").exists()


def found(model: Any) -> list[tuple[str, Any]]:
    linears = model.linears().items()
    return [(name, linear.adapters["0"].as_lora()) for name, linear in linears if "0" in linear.adapters]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("llama", "full", {}, "expected a LoRA on .*, got another change by 'full'"),
        ("llama", "lora", {"rank": 2, "modules_to_save": ("norm",)}, "expected a LoRA on .*norm, got another change"),
        ("llama-tied", "lora", {"rank": 2, "target_modules": ("lm_head",)}, "expected no change of a head that shares"),
    ],
)
def test_what_is_no_lora_is_refused(
    family: str, method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    loaded = adapted(saved(tmp_path, family)[0].loaded, options, method)
    with pytest.raises(InputError, match=message) as refused:
        gguf_lora.write(Material.of(loaded, 0), tmp_path / "a.gguf", "f32")
    assert refused.value.hint == "--to gguf writes the merged model"
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.unit
def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--to gguf-lora: expected an adapter, got a model without one"):
        gguf_lora.write(saved(tmp_path, "llama")[0], tmp_path / "a.gguf", "f32")


@pytest.mark.llama
@pytest.mark.parametrize(("family", "options"), [*((family, "patterns") for family in FAMILIES), ("llama", "rslora")])
def test_llama_cpp_answers_as_the_live_adapter(family: str, options: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    material, _ = saved(tmp_path, family)
    gguf_target.write(material, tmp_path / "base.gguf", "f32")
    loaded = adapted(material.loaded, METHODS[options])
    gguf_lora.write(Material.of(loaded, 0), tmp_path / "a.gguf", "f32")
    # keys and values in float32 (type 0), not in half precision: what is left are the last bits of sums, some 1e-5
    floats = {"n_ctx": 64, "n_threads": 2, "logits_all": True, "type_k": 0, "type_v": 0}
    theirs = open_model(tmp_path / "base.gguf", lora_path=str(tmp_path / "a.gguf"), **floats)
    theirs.eval(TOKENS)
    got = torch.from_numpy(np.array(theirs.scores[: len(TOKENS)]))
    theirs.close()
    live = logits(loaded, 0)
    torch.testing.assert_close(got, live, rtol=0, atol=2e-4)
    assert (live - logits(loaded, -1)).abs().max() > 1, "the adapter does something"
