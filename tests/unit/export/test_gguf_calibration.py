"""Exports whose scales are found by what matters to a dataset: which weights, what is written, what is said."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from typer.testing import CliRunner

from families import saved
from ftkit import _core, cli
from ftkit._core import GgufFile
from ftkit.errors import InputError
from ftkit.export import Material, export
from ftkit.export import gguf as target
from ftkit.export._calibration import calibrate
from ftkit.merge import merge
from ftkit.models import load

pytestmark = pytest.mark.unit

WORDS = "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [WORDS[start:] + WORDS[: start // 2] for start in range(40)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def write(material: Material, out: Path, kind: str, data: Path | None = None) -> list[str]:
    """Exports without the gate, which random tiny models don't pass; returns the remarks."""
    if data is not None:
        material = replace(material, calibration=calibrate(material.loaded, None, str(data), print))
    return target.write(material, out, kind)


def blocks(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", ["qwen2", "llama-tied"])
def test_every_matrix_that_has_an_input_is_rounded_by_it(family: str, tmp_path: Path, texts: Path) -> None:
    material, _ = saved(tmp_path, family)
    write(material, tmp_path / "plain.gguf", "q4_0")
    remarks = write(material, tmp_path / "calibrated.gguf", "q4_0", texts)
    theirs, ours = blocks(tmp_path / "plain.gguf"), blocks(tmp_path / "calibrated.gguf")
    expected = {name for name in ours if name.startswith("blk.") and not name.endswith((".bias", "norm.weight"))}
    expected.add("token_embd.weight" if family == "llama-tied" else "output.weight")
    assert {name for name in ours if ours[name] != theirs[name]} == expected
    metadata = GgufFile(tmp_path / "calibrated.gguf").metadata
    assert metadata["quantize.imatrix.dataset"] == "texts.jsonl"
    assert metadata["quantize.imatrix.entries_count"] == len(expected) == 22
    assert metadata["quantize.imatrix.chunks_count"] == 2  # 49 tokens and an end, 40 times, in rows of 1,024
    assert not any(key.startswith("quantize.") for key in GgufFile(tmp_path / "plain.gguf").metadata)
    assert remarks[0] == "22 weights were rounded by what matters to 1,960 tokens of texts.jsonl"
    assert remarks[1].startswith("texts.jsonl has 1,960 tokens to calibrate on, less than 4,096:")


def test_the_importance_is_that_of_the_weights_own_columns(tmp_path: Path, texts: Path) -> None:
    """Of the whole model's output, not only of single layers: it is nearer with what the texts told."""
    saved(tmp_path / "model", "qwen2")
    parities = [
        export(str(tmp_path / "model"), tmp_path / f"{number}.gguf", to="gguf", kind="q4_0", calibration=data).parity
        for number, data in enumerate((None, str(texts)))
    ]
    assert parities[1].kl_mean < parities[0].kl_mean


def test_a_files_own_calibration_is_not_claimed_of_weights_rounded_again(tmp_path: Path, texts: Path) -> None:
    first, second, third = (tmp_path / f"{name}.gguf" for name in ("first", "second", "third"))
    write(saved(tmp_path, "llama")[0], first, "q5_0", texts)
    material = Material.of(load(first))
    write(material, second, "source")
    assert GgufFile(second).metadata == GgufFile(first).metadata
    write(material, third, "q4_0")
    assert not any(key.startswith("quantize.") for key in GgufFile(third).metadata)


def test_what_is_not_rounded_is_said(tmp_path: Path, texts: Path) -> None:
    first, again = tmp_path / "first.gguf", tmp_path / "again.gguf"
    write(saved(tmp_path, "llama")[0], first, "q5_0")
    remarks = write(Material.of(load(first)), again, "source", texts)
    assert remarks == ["--calibration changed nothing: every matrix keeps the blocks that it is held in"]
    assert (GgufFile(again).metadata, blocks(again)) == (GgufFile(first).metadata, blocks(first))


@pytest.mark.parametrize(("to", "kind"), [("safetensors", None), ("peft", None), ("gguf", "f16"), ("gguf", None)])
def test_types_that_round_nothing_by_it_are_refused(to: str, kind: str | None, tmp_path: Path, texts: Path) -> None:
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    with pytest.raises(InputError, match="--calibration: expected a quantized type of gguf, got"):
        export(str(tmp_path / "nothing"), out, to=to, kind=kind, calibration=str(texts))
    with pytest.raises(InputError, match="--calibration: expected a quantized type of gguf, got safetensors bf16"):
        merge(str(tmp_path / "nothing"), tmp_path / "merged", calibration=str(texts))


def test_data_that_is_not_there_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama")
    arguments = ["export", str(tmp_path / "model"), "--to", "gguf", "--type", "q4_0", "--out", str(tmp_path / "a.gguf")]
    result = CliRunner().invoke(cli.application(), [*arguments, "--calibration", str(tmp_path / "none.jsonl")])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith("--calibration: expected a file or a directory of rows, got nothing at")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_preferences_and_chats_calibrate_as_texts_do(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    material, _ = saved(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").write_text(template)
    pair = {"prompt": "AB", "chosen": "CD" * 20, "rejected": "EF" * 20}
    chat = {"messages": [{"role": "user", "content": "AB"}, {"role": "assistant", "content": "CD" * 20}]}
    for number, row in enumerate((pair, chat)):
        path = tmp_path / f"rows{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        found = calibrate(material.loaded, None, str(path), print)
        assert found.tokens == (88, 44)[number]


def test_the_writers_blocks_are_the_quantizers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    values, importance = torch.randn(70, 96, generator=generator), torch.randn(96, generator=generator).exp()
    writer = _core.GgufWriter(tmp_path / "a.gguf", [], [("a", values.shape, "q4_1")])
    writer.write("a", values, importance)
    writer.finish()
    expected = torch.empty(70, 60, dtype=torch.uint8)
    _core.quantize("q4_1", values, expected, importance)
    written = torch.empty(70 * 60, dtype=torch.uint8)
    GgufFile(tmp_path / "a.gguf").read_blocks("a", written)
    assert torch.equal(written, expected.flatten())
