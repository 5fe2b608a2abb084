"""What an export leaves: a model that answers the same, or the place as it was."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from families import saved
from ftkit import adapters, cli
from ftkit.errors import GateError, InputError
from ftkit.eval.parity import Bounds
from ftkit.export import _publish, export
from ftkit.models import load
from ftkit.nn.batch import RaggedBatch

pytestmark = pytest.mark.unit


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    saved(folder, "llama")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A LoRA that changes what the model says."""
    loaded = load(base)
    adapters.attach(loaded.model, "lora", {"rank": 4}, seed=1)
    torch.manual_seed(3)
    for parameter in adapters.trainable(loaded.model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapters.save(loaded.model, 0, tmp_path / "adapter", loaded.fingerprint)
    return tmp_path / "adapter"


def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    loaded = load(base)
    if adapter is not None:
        adapters.load(loaded.model, adapter, 0)
    batch = RaggedBatch.pack([list(range(3, 40))], adapter=-1 if adapter is None else 0)
    with torch.inference_mode():
        return loaded.model.head(loaded.model(batch), batch.routes)


@pytest.mark.parametrize(("to", "kind", "name"), [("gguf", "f32", "out.gguf"), ("safetensors", "f32", "out")])
def test_the_adapter_is_in_what_is_written(
    to: str, kind: str, name: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    result = export(str(base), tmp_path / name, to=to, kind=kind, adapter=adapter)
    assert result.parity.passed
    expected = logits(base, adapter)
    assert not torch.allclose(expected, logits(base, None), atol=1e-2)
    torch.testing.assert_close(logits(tmp_path / name, None), expected, rtol=1e-4, atol=1e-4)
    if to == "safetensors":
        read = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            theirs = read(torch.arange(3, 40)[None]).logits[0]
        torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    size = sum(path.stat().st_size for path in [tmp_path / name, *(tmp_path / name).glob("*")] if path.is_file())
    assert result.bytes == size


def test_peft_gets_the_adapter_bit_for_bit(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = export(str(base), tmp_path / "out", to="peft", adapter=adapter)
    assert result.parity.kl_max == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_that_answers_otherwise_leaves_the_place_as_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("before")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(_publish, "bounds", lambda _: Bounds(kl_mean=-1.0, top1=1.0))
    with pytest.raises(GateError, match="gguf q8_0: expected what was written to answer as the model does, got KL"):
        export(str(base), out, to="gguf", kind="q8_0", overwrite=True)
    assert out.read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == before


def test_weights_in_the_wrong_order_do_not_pass(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftkit.models import llama

    monkeypatch.setattr(llama, "to_gguf", lambda config, name, tensor: tensor)  # noqa: ARG005
    with pytest.raises(GateError):
        export(str(base), tmp_path / "out.gguf", to="gguf", kind="f16")
    assert not (tmp_path / "out.gguf").exists()


def test_what_is_there_is_replaced_whole(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(base), out, to="safetensors", kind="f32")
    (out / "stale.txt").touch()
    export(str(base), out, to="safetensors", kind="bf16", overwrite=True)
    assert not (out / "stale.txt").exists()
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf", "out": "there.gguf"}, "expected a path that is free, got one that exists"),
        ({"to": "gguf", "out": "model.bin"}, "expected a file that ends with .gguf"),
        ({"to": "gguf", "out": "a.gguf", "kind": "q9"}, "--type: expected one of source, f32, f16"),
        (
            {"to": "safetensors", "out": "a", "kind": "q4_0"},
            "expected one of bf16, f16, f32 for safetensors, got 'q4_0'",
        ),
        ({"to": "onnx", "out": "a"}, "got 'onnx'"),
        ({"to": "peft", "out": "a"}, "--to peft: expected an adapter, got a model without one"),
        ({"to": "safetensors", "out": "mine", "overwrite": True}, "expected a model or an adapter to replace"),
        ({"to": "safetensors", "out": "there.gguf", "overwrite": True}, "expected a directory to replace"),
        ({"to": "safetensors", "out": "base", "overwrite": True}, "--out: expected a place apart from"),
        ({"to": "safetensors", "out": "base/inside"}, "--out: expected a place apart from"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / options.pop("out")
    with pytest.raises(InputError) as caught:
        export(str(base), out, **options)
    assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_weight_too_large_for_half_precision_is_named(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 70_000
    from safetensors.torch import save_file

    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for to, name in (("gguf", "out.gguf"), ("safetensors", "out")):
        with pytest.raises(
            InputError, match=r"(blk\.0\.ffn_up|up_proj)\.weight.*expected .*65504.* for f16, got 70000"
        ):
            export(str(base), tmp_path / name, to=to, kind="f16")
        assert not (tmp_path / name).exists()


def test_the_command_prints_one_json_document(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(base), "--to", "gguf", "--type", "q8_0", "--out", str(tmp_path / "m.gguf"), "--json"]
    monkeypatch.setattr(sys, "argv", ["ftkit", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["out"] == str(tmp_path / "m.gguf")
    assert document["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert {"kl_mean", "kl_max", "top1", "greedy_match", "passed"} <= document["parity"].keys()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
