"""Files appear whole or not at all, whatever happens while they are written."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ftkit.errors import FtkitError, InputError
from ftkit.train import files

pytestmark = pytest.mark.unit


def test_a_directory_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with files.new_directory(target) as folder:
        (folder / "a").write_text("old")

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), files.new_directory(target) as folder:
        fail(folder)
    assert (target / "a").read_text() == "old"
    with files.new_directory(target) as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_place_is_an_input_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    """The system's limit on a file's size stands for a full disk: writing fails in the middle in the same way."""
    text, folder = tmp_path / "a.json", tmp_path / "checkpoint"
    files.write_text(text, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"a\.json: expected room for this file, got: file too large"):
            files.write_text(text, "x" * 20_000)
        with pytest.raises(InputError, match="checkpoint: expected room"), files.new_directory(folder) as inside:
            save_file({"x": torch.zeros(100_000)}, inside / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert text.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_refuses_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a place that can be written to"):
        files.write_text(tmp_path / "file" / "a", "")
    with pytest.raises(FtkitError, match="no such file"):
        files.write_text(tmp_path / "absent" / "a", "")


def test_killed_at_any_moment_a_reader_finds_a_whole_file(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ftkit.train import files\n"
        "folder = Path(sys.argv[1])\n"
        "for number in range(10**9):\n"
        "    files.write_text(folder / 'a', str(number % 10) * 3_000_000)\n"
        "    print('.', flush=True)\n"
    )
    for moment in (0.0, 0.003, 0.011):
        writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(moment)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        text = (tmp_path / "a").read_text()
        assert len(text) == 3_000_000
        assert len(set(text)) == 1
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
