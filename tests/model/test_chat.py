"""The chat command on the real model: one question through a pipe, and a conversation in a terminal."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftkit import cli
from ftkit.engine import GREEDY, Sampling, launch

pytestmark = pytest.mark.model

QUESTION = "What is the capital of France?"


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: its exit code, what it prints and what it says."""

    def run(question: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ftkit", "chat", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(question))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_one_question_through_a_pipe(smollm2: Path, chat: Callable[..., tuple[int, str, str]]) -> None:
    with launch(smollm2) as engine:
        talk = [{"role": "user", "content": QUESTION}]
        expected = engine.generate(talk, Sampling(temperature=GREEDY.temperature, max_tokens=24))
    words = [str(smollm2), "--temperature", "0", "--max-tokens", "24"]
    command = [sys.executable, "-m", "ftkit", "chat", *words, "--json"]
    result = subprocess.run(command, input=QUESTION, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["text"] == expected.text
    assert document["finish_reason"] == expected.finish_reason
    assert document["tokens"] == expected.completion_tokens
    code, plain, _ = chat(QUESTION, *words)
    assert (code, plain) == (0, expected.text + "\n")


def test_bad_input_is_said_with_exit_code_2(smollm2: Path, chat: Callable[..., tuple[int, str, str]]) -> None:
    for arguments, question, reason in [
        ([str(smollm2)], "", "expected a question"),
        ([str(smollm2.parent / "none.gguf")], QUESTION, "expected a directory"),
        ([str(smollm2), "--adapter", "/nowhere"], QUESTION, "/nowhere"),
        ([str(smollm2)], "word " * 20_000, "context"),
    ]:
        code, printed, said = chat(question, *arguments)
        assert (code, printed) == (2, ""), said
        assert reason in said


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.process, self._file = pty.fork()
        if self.process == 0:
            os.environ |= {"TERM": "xterm", "FTKIT_CACHE": str(folder), "COLUMNS": "200", "LINES": "50"}
            os.execv(sys.executable, [sys.executable, "-m", "ftkit", "chat", *arguments])
        self.seen = ""

    def send(self, keys: str) -> None:
        os.write(self._file, keys.encode())

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Reads until `text` comes; what came before it is forgotten."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, f"expected {text!r} within {seconds} s, got {self.seen[-2000:]!r}"
            if select.select([self._file], [], [], 0.2)[0]:
                part = os.read(self._file, 65536).decode(errors="replace")
                if "\x1b[6n" in part:  # prompt_toolkit asks where the cursor is
                    os.write(self._file, b"\x1b[1;1R")
                self.seen += part
        self.seen = self.seen.partition(text)[2]

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_a_conversation_in_a_terminal(smollm2: Path, tmp_path: Path) -> None:
    terminal = Terminal([str(smollm2), "--temperature", "0", "--max-tokens", "400"], tmp_path)
    terminal.wait_for("Ctrl-D leaves")
    terminal.send(QUESTION + "\r")
    terminal.wait_for("Paris")
    terminal.send("/undo\r")
    terminal.wait_for("took back: " + QUESTION)
    terminal.send("/nonsense\r")
    terminal.wait_for("expected a command")
    terminal.send("Write a long story about a dragon and a village.\r")
    terminal.wait_for("?2004l")  # the prompt is left, the answer begins
    terminal.wait_for(" the ")
    terminal.send("\x03")
    terminal.wait_for("stopped")
    terminal.send(f"/save {tmp_path / 'chats.jsonl'}\r")
    terminal.wait_for("saved to")
    (row,) = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    terminal.send("/stats\r")
    terminal.wait_for("tokens/s")
    terminal.send("/quit\r")
    assert terminal.end() == 0
