"""Texts that the real model writes by itself."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftkit import data, models
from ftkit.cli.data import command
from ftkit.config import DataConfig

pytestmark = pytest.mark.model


def test_the_same_seed_gives_the_same_bytes_and_rows_that_can_be_trained_on(smollm2: Path, tmp_path: Path) -> None:
    def written(name: str, *options: str) -> bytes:
        arguments = ["generate", str(smollm2), "--tokens", "12", "--out", str(tmp_path / name), *options]
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert result.stdout == ""
        return (tmp_path / name).read_bytes()

    first = written("a.jsonl", "--rows", "5")
    assert written("b.jsonl", "--rows", "5") == first
    assert written("more.jsonl", "--rows", "7").startswith(first)
    assert written("other.jsonl", "--rows", "5", "--seed", "1") != first
    texts = [json.loads(line)["text"] for line in first.decode().splitlines()]
    assert len(set(texts)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "more.jsonl", "other.jsonl"]
    prepared = data.encode(DataConfig(path=str(tmp_path / "a.jsonl")), models.tokenizer_of(smollm2), None)
    assert prepared.statistics["bad_rows"] == 0
    assert prepared.statistics["trained_tokens"] > 40


def test_a_file_is_not_overwritten(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("mine")
    result = CliRunner().invoke(command, ["generate", str(smollm2), "--rows", "1", "--out", str(out)])
    assert result.exit_code != 0
    assert "expected a path that is free" in str(result.exception)
    assert out.read_text() == "mine"
