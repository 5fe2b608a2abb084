"""A server as a process of its own, for tests."""

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

KEY = "a-key-for-tests"
BASE = "SmolLM2-135M-Instruct.Q4_1"


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        request = urllib.request.Request(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=60) as response:
            found = re.search(rf"^ftkit_{name} (\S+)$", response.read().decode(), re.MULTILINE)
        assert found, name
        return float(found[1])

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)


def start(*arguments: str) -> Server:
    """Starts `ftkit serve` and waits for its first line."""
    command = [sys.executable, "-m", "ftkit", "serve", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    line = process.stderr.readline().strip()
    assert line.startswith("http://"), line + process.stderr.read()
    return Server(line, process)


def stop(server: Server) -> int:
    """SIGINT, and its exit code."""
    server.process.send_signal(signal.SIGINT)
    try:
        server.process.communicate(timeout=40)
    finally:
        server.process.kill()
    return server.process.returncode
