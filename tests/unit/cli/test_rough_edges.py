"""What a newcomer types and what a hostile disk gives: one message, no traceback, nothing left over."""

import errno
import importlib.metadata
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ftkit import cli
from ftkit.train.progress import ProgressLine

pytestmark = pytest.mark.unit


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(cli.application(), ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"ftkit {importlib.metadata.version('ftkit')}\n"


def test_a_tensor_that_memory_cannot_hold_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def application() -> Callable[..., None]:
        return lambda **_: torch.empty(1 << 60)

    monkeypatch.setattr(cli, "application", application)
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 1
    assert capsys.readouterr().err.startswith("error: expected memory")


def test_the_last_line_of_a_run_in_a_terminal_says_that_it_is_done() -> None:
    shown = io.StringIO()
    line = ProgressLine(shown)
    line._console = Console(file=shown, force_terminal=True, width=100)
    step = {"event": "step", "loss": 1.0, "tokens_per_second": 5.0, "rss_bytes": 1, "seconds_left": 0}
    line({"event": "started", "run": "r", "steps": 2, "summary": "s"})
    for number in (1, 2):
        line(step | {"step": number})
    line({"event": "sample", "number": 0, "moment": "after", "prompt": "p", "answer": "a"})
    line({"event": "finished", "run": "r", "steps": 2, "adapter": "x"})
    assert shown.getvalue().rstrip().endswith("r: done, 2 steps, adapter in x")
    assert "step 2/2" not in shown.getvalue().partition("example:")[2]


def test_one_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    for name, content in (("good", b"[model]\nsource = 'm'\n"), ("bad", b"\xff[[")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_bytes(content)
    result = CliRunner().invoke(cli.application(), ["runs", "list", "--runs-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert "good" in result.stdout
    assert "damaged" in result.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["chat", "m", "--seed", str(2**64)], "--seed"),
        (["chat", "m", "--max-tokens", str(10**12)], "--max-tokens"),
        (["train", "--model", "m", "--data", "d", "--set", "training.threads=100000"], "training.threads: expected"),
        (["train", "--model", "m", "--data", "d", "--set", "method.rank=1000000"], "rank: expected"),
        (["runs", "list", "--runs-dir", __file__], "expected"),
        (["runs", "prune", "--runs-dir", __file__], "expected"),
    ],
)
def test_bounds_come_before_work(
    words: list[str], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ftkit", *words])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2
    assert part in capsys.readouterr().err


def test_a_full_disk_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from ftkit.train import files

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def application() -> Callable[..., None]:
        return lambda **_: files.write_text(tmp_path / "config.toml", "text")

    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr(cli, "application", application)
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "config.toml: " in said
    assert "no space left" in said.lower()
    assert not list(tmp_path.iterdir())
