"""The quickstart, whole: the model visibly learns, and the merged model answers as the live one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftkit import models

pytestmark = [pytest.mark.model, pytest.mark.slow]


def test_quickstart_learns_and_the_result_is_usable(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ftkit", "quickstart", "--json", "--runs-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert set(document) >= {"score_before", "score_after", "run", "merged", "parity", "seconds"}
    assert document["score_before"] <= 0.05
    assert document["score_after"] >= 0.8
    assert document["parity"]["passed"]
    assert models.resolve("quickstart", tmp_path).adapter == tmp_path / "quickstart" / "adapter"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
