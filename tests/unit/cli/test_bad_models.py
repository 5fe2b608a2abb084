"""Every command given something that is no model: exit code 2, what was expected, nothing written."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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

ALL = """
import contextlib, io, json, sys
from ftkit import cli
found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["ftkit", *words]
    err = io.StringIO()
    sys.stdin = io.StringIO("hello")
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code
    found.append([code, err.getvalue()])
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_command_says_what_is_wrong(kind: Callable[[Path], None], tmp_path: Path) -> None:
    kind(tmp_path / "the-model")
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    model = next(tmp_path.glob("the-model*"), tmp_path / "the-model").name
    names = {"MODEL": f"./{model}", "DATA": "data.jsonl", "OUT": "out", "ADAPTER": "adapter"}
    before = sorted(path.name for path in tmp_path.iterdir())
    asked = [[command, *(names.get(word, word) for word in words)] for command, words in COMMANDS.items()]
    process = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(asked)], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert process.returncode == 0, process.stderr
    for command, (code, said) in zip(COMMANDS, json.loads(process.stdout), strict=True):
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2, (command, code, said)
        assert len(lines) == 1, (command, said)
        assert "expected" in said, (command, said)
        assert "the-model" in said, (command, said)
        assert "Traceback" not in said, (command, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
