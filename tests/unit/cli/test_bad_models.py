"""Every command given something that is no model: exit code 2, what was expected, nothing written."""

import io
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftkit import cli

pytestmark = pytest.mark.unit

COMMANDS: dict[str, list[str]] = {
    "train": ["--model", "MODEL", "--data", "DATA"],
    "plan": ["--model", "MODEL", "--data", "DATA"],
    "chat": ["MODEL"],
    "serve": ["MODEL", "--port", "0"],
    "merge": ["MODEL", "--adapter", "ADAPTER", "--out", "OUT"],
    "export": ["MODEL", "--to", "safetensors", "--out", "OUT"],
    "eval": ["MODEL", "--data", "DATA"],
    "quickstart": ["--model", "MODEL"],
}


def missing(_: Path) -> None:
    pass


def empty_directory(path: Path) -> None:
    path.mkdir()


def no_weights(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')


def broken_configuration(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{")


def unknown_family(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "nobody", "architectures": ["NobodyForCausalLM"]}')


def truncated_safetensors(path: Path) -> None:
    path.mkdir()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    ones = ("num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama"} | dict.fromkeys(sizes, 8) | dict.fromkeys(ones, 1))
    )
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 7)


def truncated_gguf(path: Path) -> None:
    path.with_suffix(".gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5) + b"\0" * 9)


def text(path: Path) -> None:
    path.write_text("this is no model")


KINDS: list[Callable[[Path], None]] = [
    missing, empty_directory, no_weights, broken_configuration, unknown_family, truncated_safetensors, truncated_gguf,
    text,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_command_says_what_is_wrong(
    kind: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kind(tmp_path / "the-model")
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    model = next(tmp_path.glob("the-model*"), tmp_path / "the-model").name
    names = {"MODEL": f"./{model}", "DATA": "data.jsonl", "OUT": "out", "ADAPTER": "adapter"}
    before = sorted(path.name for path in tmp_path.iterdir())
    for command, words in COMMANDS.items():
        monkeypatch.setattr(sys, "argv", ["ftkit", command, *(names.get(word, word) for word in words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 2, (command, said)
        assert len(lines) == 1, (command, said)
        assert "expected" in said, (command, said)
        assert "the-model" in said, (command, said)
        assert "Traceback" not in said, (command, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
