"""The examples run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_configuration_trains(smollm2: Path, tmp_path: Path) -> None:
    options = ["--model", str(smollm2), "--runs-dir", str(tmp_path), "--max-steps", "2", "--json"]
    result = json.loads(run("-m", "ftkit", "train", "examples/conversations.toml", *options))
    assert (result["run"], result["steps"]) == ("pirate", 2)
    assert result["peak_bytes"] <= result["planned_peak_bytes"]
    assert result["peak_rss_bytes"] <= result["planned_peak_rss_bytes"]


def test_a_question_from_python(smollm2: Path) -> None:
    assert "Paris" in run("examples/ask.py", str(smollm2), "What is the capital of France?")
