"""A server as a process of its own, for tests."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KEY = "a-key-for-tests"
BASE = "SmolLM2-135M-Instruct.Q4_1"


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status_code: int
    content: bytes
    headers: dict[str, str]

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        return json.loads(self.content)


class Http:
    """Requests that are no business of the official client."""

    def __init__(self, url: str, key: str | None = KEY) -> None:
        self.url, self.key = url, key

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        given = {"authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.url + path, body, given | (headers or {}), method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, response.read(), {k.lower(): v for k, v in response.headers.items()})
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read(), {k.lower(): v for k, v in error.headers.items()})

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def delete(self, path: str) -> Answer:
        return self.send("DELETE", path)

    def post(self, path: str, json: Any = None) -> Answer:
        body = b"" if json is None else _json(json)
        return self.send("POST", path, body, {"content-type": "application/json"})


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


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
            time.sleep(0.05)


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
