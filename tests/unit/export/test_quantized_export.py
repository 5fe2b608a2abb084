"""Matrices written in 4 bits: transformers loads the directory, with our very numbers, and so do we."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from families import saved
from ftkit import adapters, merge
from ftkit.errors import InputError
from ftkit.export import Material, export, safetensors
from ftkit.export._quantized import quantized
from ftkit.models import LoadedModel, load
from ftkit.nn.batch import RaggedBatch
from ftkit.quant._scheme import QuantizedWeight

pytestmark = pytest.mark.unit

TOKENS = list(range(3, 40))
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
UNEVEN = 3  # down_proj of each layer has rows of 96 values, which blocks of 64 don't divide
LINEARS = 21


def written(material: Material, quant: str, kind: str, out: Path, *, requantize: bool = False) -> list[str]:
    """Writes without the comparison: random weights are far from what rounding leaves of them."""
    material, remarks = quantized(material, quant, requantize)
    return remarks + safetensors.write(material, out, kind)


def theirs(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # on processors that have the instructions it would multiply in bfloat16, whatever the dtype
            module.support_avx512bf16_for_cpu = False
    return model


def matrix(module: nn.Module) -> Tensor:
    """What a layer of transformers multiplies with."""
    weight: Any = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert isinstance(weight, Tensor)
    return weight.detach()


def logits(loaded: LoadedModel, adapter: int = -1) -> Tensor:
    batch = RaggedBatch.pack([TOKENS], adapter=adapter)
    with torch.inference_mode():
        return loaded.model.head(loaded.model(batch), batch.routes)


def held(loaded: LoadedModel) -> dict[str, QuantizedWeight]:
    linears = loaded.model.linears().items()
    return {name: linear.weight for name, linear in linears if isinstance(linear.weight, QuantizedWeight)}


@pytest.mark.parametrize(
    ("family", "quant", "kind"),
    [
        ("llama", "nf4", "f32"),
        ("llama", "nf4:single", "bf16"),
        ("llama", "int4:32", "f32"),
        ("llama-tied", "nf4", "bf16"),
        ("llama-tied", "int4:32", "bf16"),
        ("qwen2", "nf4", "f32"),
        ("qwen2", "fp4", "bf16"),
        ("qwen2", "int4:32", "f32"),
    ],
)
def test_transformers_loads_our_numbers(family: str, quant: str, kind: str, tmp_path: Path) -> None:
    material, _ = saved(tmp_path / "base", family)
    remarks = written(material, quant, kind, tmp_path / "out")
    uneven = 0 if quant.startswith("int4") else UNEVEN
    assert f"{LINEARS - uneven} matrices were quantized to {quant}: weights moved by" in remarks[0]
    assert len(remarks) == 1 + bool(uneven)
    ours, peer = load(tmp_path / "out", dtype=DTYPES[kind]), theirs(tmp_path / "out")
    weights = held(ours)
    assert len(weights) == LINEARS - uneven
    assert {weight.scheme.name for weight in weights.values()} == {quant}
    for name, linear in ours.model.linears().items():
        assert torch.equal(matrix(peer.get_submodule(name)), linear.weight.dense()), name
    with torch.no_grad():
        got = peer(torch.tensor([TOKENS])).logits[0]
    # in bfloat16 both round each layer's sums, in orders of their own: some steps of 2⁻⁸ at logits of 4 to 8
    tolerance = 1e-4 if kind == "f32" else 0.5
    torch.testing.assert_close(got, logits(ours), rtol=0, atol=tolerance)
    assert not torch.allclose(got.float(), logits(material.loaded), atol=tolerance)


def test_the_gate_compares_what_was_written_and_the_command_says_what_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "base", "llama")
    from ftkit.eval import parity

    monkeypatch.setitem(parity._BOUNDS, "nf4", parity.Bounds(kl_mean=9.0, top1=0.0))  # random weights are not smooth
    result = export(str(tmp_path / "base"), tmp_path / "out", to="safetensors", quant="nf4")
    assert 0.01 < result.parity.kl_mean < 9
    assert "weights moved by" in result.remarks[0]
    again = export(str(tmp_path / "out"), tmp_path / "again", to="safetensors", quant="nf4", kind="bf16")
    assert again.parity.kl_mean < 1e-6
    assert again.remarks == (f"{LINEARS - UNEVEN} matrices keep the nf4 codes that they are held in",)
    assert tensors(tmp_path / "again") == tensors(tmp_path / "out")
    dense = export(str(tmp_path / "out"), tmp_path / "dense", to="safetensors", kind="f32")
    assert dense.parity.kl_mean < 1e-9
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not held(load(tmp_path / "dense"))


def tensors(folder: Path) -> dict[str, list[int]]:
    """The bytes of a directory's tensors."""
    found = load_file(folder / "model.safetensors")
    return {name: tensor.contiguous().view(-1).view(torch.uint8).tolist() for name, tensor in found.items()}


PEERS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4:single": {"bnb_4bit_quant_type": "nf4"},
    "nf4 but": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["up_proj"]},
}


@pytest.fixture
def of_peers(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory as transformers and bitsandbytes write it."""

    def make(family: str = "llama", **options: Any) -> Path:
        saved(tmp_path / "base", family)
        config = BitsAndBytesConfig(load_in_4bit=True, **(options or PEERS["nf4"]))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
        model.save_pretrained(tmp_path / "peer")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "peer" / name).write_bytes((tmp_path / "base" / name).read_bytes())
        return tmp_path / "peer"

    return make


@pytest.mark.parametrize("kind", PEERS)
def test_directories_of_bitsandbytes_are_held_as_they_are(
    kind: str, of_peers: Callable[..., Path], tmp_path: Path
) -> None:
    folder = of_peers(**PEERS[kind])
    ours, stored = load(folder), load_file(folder / "model.safetensors")
    weights = held(ours)
    assert weights.keys() == {
        name.partition(".weight.quant_state")[0] for name in stored if ".weight.quant_state" in name
    }
    # with modules to skip, transformers takes the head unless it is among them
    assert len(weights) == (LINEARS if kind != "nf4 but" else LINEARS - 3 + 1)
    for name, weight in weights.items():
        assert weight.scheme.name == kind.partition(" ")[0]
        assert torch.equal(weight.parts["codes"], stored[f"{name}.weight"].view(-1))
    peer = theirs(folder)
    for name, weight in weights.items():
        if weight.shape[1] % 64 == 0:  # others bitsandbytes decodes wrongly on a CPU
            assert torch.equal(matrix(peer.get_submodule(name)).float(), weight.dense())
    assert ours.fingerprint == load(folder, quant=kind.partition(" ")[0]).fingerprint
    converted = load(folder, quant="int8")
    assert converted.fingerprint == f"{ours.fingerprint}+int8"
    assert {weight.scheme.name for weight in held(converted).values()} == {"int8"}
    written(Material.of(ours), kind.partition(":")[0].partition(" ")[0], "f32", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, weight in weights.items():
        if weight.shape[1] % 64 == 0:
            assert torch.equal(again[f"{name}.weight"], stored[f"{name}.weight"])
            assert torch.equal(again[f"{name}.weight.absmax"], stored[f"{name}.weight.absmax"])
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(ours), rtol=1e-5, atol=1e-5)


def test_a_table_of_its_own_is_the_files(of_peers: Callable[..., Path]) -> None:
    folder, name = of_peers(), "model.layers.1.self_attn.q_proj"
    before = load(folder)
    stored = load_file(folder / "model.safetensors")
    stored[f"{name}.weight.quant_map"] *= 1.5
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    after = held(load(folder))
    torch.testing.assert_close(after[name].dense(), 1.5 * held(before)[name].dense())
    assert "table" not in after["model.layers.1.self_attn.k_proj"].parts


def test_an_adapter_is_trained_over_the_codes_and_merged_into_them(
    of_peers: Callable[..., Path], tmp_path: Path
) -> None:
    folder = of_peers("qwen2")
    loaded = load(folder)
    adapters.attach(loaded.model, "lora", {"rank": 4, "target_modules": ("q_proj",)}, seed=1)
    torch.manual_seed(3)
    for parameter in adapters.trainable(loaded.model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapters.save(loaded.model, 0, tmp_path / "adapter")
    remarks = written(Material.of(loaded.__class__(**vars(loaded)), 0), "nf4", "f32", tmp_path / "out")
    kept = LINEARS - UNEVEN - 3
    assert remarks[0] == f"{kept} matrices keep the nf4 codes that they are held in"
    assert remarks[1].startswith(
        "3 matrices were quantized to nf4 (3 of them had been quantized before): weights moved"
    )
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for name in held(loaded):
        if not name.endswith("down_proj"):
            same = torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
            assert same == (not name.endswith("q_proj")), name
    with pytest.raises(InputError, match="expected one adapter of weight 1 over a quantized base"):
        merge.merge(str(folder), tmp_path / "both", folders=[tmp_path / "adapter"] * 2)
    merged = merge.merge(str(folder), tmp_path / "merged", folders=[tmp_path / "adapter"], kind="f32")
    assert merged.parity.kl_mean < 1e-9


def test_float_offsets_are_not_rounded_unasked(tmp_path: Path) -> None:
    saved(tmp_path / "base", "llama")
    loaded = load(tmp_path / "base", quant="int4_group:32")
    adapters.attach(loaded.model, "qalora", {"rank": 4}, seed=1)
    torch.manual_seed(3)
    for parameter in adapters.trainable(loaded.model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    loaded.model.eval()
    for material in (Material.of(loaded), Material.of(loaded, 0)):
        with pytest.raises(InputError, match="expected matrices without float offsets, got 21 with them") as refused:
            written(material, "int4", "f32", tmp_path / "out")
        assert "--requantize" in str(refused.value.hint)
        assert not (tmp_path / "out").exists()
        remarks = written(material, "int4:32", "f32", tmp_path / f"out{material.adapter_id}", requantize=True)
        assert "quantized to int4:32 (21 of them had been quantized before)" in remarks[0]
    assert "nf4" in written(Material.of(loaded, 0), "nf4", "f32", tmp_path / "other")[0]


def test_zero_points_that_are_held_are_written_as_they_are(tmp_path: Path) -> None:
    material, _ = saved(tmp_path / "base", "llama")
    written(material, "int4:32", "bf16", tmp_path / "out")
    again = Material.of(load(tmp_path / "out"))
    for kind in ("bf16", "f32"):
        assert written(again, "int4", kind, tmp_path / kind) == [
            f"{LINEARS} matrices keep the int4:32 codes that they are held in"
        ]
    assert tensors(tmp_path / "bf16") == tensors(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "f32")), logits(load(tmp_path / "out")))
    # files of symmetric codes have no zero points
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith("zero_point")}
    save_file(kept, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    name = "model.layers.0.self_attn.q_proj"
    dense, parts = held(load(tmp_path / "out"))[name].dense(), held(again.loaded)[name].parts
    codes = torch.stack([parts["codes"] >> 4, parts["codes"] & 15], -1).view(64, 2, 32).float()
    assert torch.equal(dense, ((codes - 8) * parts["scales"].float().unsqueeze(2)).view(64, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "expected the quant_method bitsandbytes or compressed-tensors, got 'gptq'"),
        ({"quant_method": "awq"}, "got 'awq'"),
        ({"quant_method": None}, "got None"),
        ({"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True}, "expected bitsandbytes in 4 bits"),
        ({"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type: expected one of nf4, fp4, got 'nf5'"),
        ({"bnb_4bit_quant_type": "fp4"}, r"expected \(type, block, .*, got \('nf4', 64, 256, True\)"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "expected compressed-tensors of .*float-quantized",
        ),
    ],
)
def test_what_is_not_read_is_named(changes: dict[str, Any], message: str, of_peers: Callable[..., Path]) -> None:
    folder = of_peers()
    table = json.loads((folder / "config.json").read_text())
    table["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("q_proj.weight", lambda tensor: tensor[:-1], r"expected codes of torch.uint8 \(2048,\), got"),
        ("q_proj.weight.absmax", lambda tensor: tensor.float(), "expected scales of torch.uint8"),
        ("q_proj.weight.nested_absmax", lambda tensor: tensor * torch.inf, "expected finite scale_scales"),
        ("q_proj.weight.nested_quant_map", lambda tensor: tensor[:99], "expected a map of 256 numbers"),
        ("q_proj.weight.quant_state.bitsandbytes__nf4", lambda tensor: tensor[:-1], "expected a JSON object, got"),
        ("q_proj.weight.quant_state.bitsandbytes__nf4", lambda _: None, "or a matrix of bitsandbytes, got U8"),
    ],
)
def test_damage_is_named(
    name: str, damage: Callable[[Tensor], Tensor | None], message: str, of_peers: Callable[..., Path]
) -> None:
    folder = of_peers()
    stored = load_file(folder / "model.safetensors")
    key = f"model.layers.1.self_attn.{name}"
    changed = damage(stored.pop(key))
    save_file(stored | ({} if changed is None else {key: changed}), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message) as refused:
        load(folder)
    assert "model.layers.1.self_attn.q_proj" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf", "quant": "nf4", "out": "a.gguf"}, "--quant: expected none for gguf, got 'nf4'"),
        ({"to": "safetensors", "quant": "nf5"}, "--quant: expected one of nf4, fp4, int4 for safetensors, got 'nf5'"),
        ({"to": "safetensors", "quant": "int4:7"}, "expected one of int4, int4:32, int4:64, int4:128, got 'int4:7'"),
        ({"to": "safetensors", "quant": "nf4:32"}, "expected one of nf4, nf4:single, got 'nf4:32'"),
        ({"to": "safetensors", "quant": "int4:128"}, "expected rows of whole blocks of 128 values, got none"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "base", "llama")
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(InputError) as refused:
        export(str(tmp_path / "base"), out, **options)
    assert message in str(refused.value)
    assert not out.exists()
