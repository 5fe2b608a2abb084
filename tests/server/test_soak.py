"""Mixed load for a while: answers, streams, callers that leave, bad bodies, adapters that are replaced meanwhile.

Each answer is the one that the same request has alone, no page is lost, memory stays. `FTKIT_SOAK_REQUESTS=10000` makes
it long.
"""

import concurrent.futures
import json
import os
import random
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from managing import adapter
from serving import KEY, Http, Server, start, stop
from speakers import speaker

pytestmark = pytest.mark.server

REQUESTS = int(os.environ.get("FTKIT_SOAK_REQUESTS", "2400"))
WORDS = ["one", "two", "three", "four"]
BAD = [b"", b"{", b"[]", b'{"messages": 1}', b'{"prompt": "x", "max_tokens": -1}', b"\xff" * 50, b"[" * 9000, b"null"]
CHAT, TEXT, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


class Load:
    """A server under load, and what each request has for an answer when it is alone."""

    def __init__(self, server: Server) -> None:
        self.server, self.http = server, Http(server.url)
        self.alone: dict[str, set[str]] = {}

    def requests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every kind of request whose answer is known."""
        for word in WORDS:
            how: dict[str, Any] = {"max_tokens": 5 + len(word), "temperature": 0.8, "seed": len(word)}
            for model in ("speaker", "fixed", "moving"):
                yield CHAT, {"model": model, "messages": [{"role": "user", "content": word}], **how}
                yield TEXT, {"model": model, "prompt": word * 9, "stream": True, **how}
            yield EMBEDDINGS, {"model": "fixed", "input": word}
        yield TEXT, {"model": "speaker", "prompt": "long " * 40, "max_tokens": 40, "temperature": 0}

    def ask(self, path: str, body: dict[str, Any]) -> str:
        """What of the answer does not change from one time to the next."""
        answer = self.http.post(path, body)
        assert answer.status_code == 200, answer.text
        if body.get("stream"):
            parts = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            return "".join(part["choices"][0]["text"] for part in parts)
        if path == EMBEDDINGS:
            return str(answer.json()["data"][0]["embedding"][:4])
        choice = answer.json()["choices"][0]
        return str(choice["message"]["content"] if path == CHAT else choice["text"])

    def leave(self, dice: random.Random) -> None:
        """Asks for a long answer, or a long text's embedding, and does not wait for it."""
        streams, embeds = dice.random() < 0.5, dice.random() < 0.3
        asked: dict[str, Any] = {"prompt": "x", "max_tokens": 2000, "stream": streams, "ignore_eos": True}
        if embeds:
            asked = {"model": "fixed", "input": "x" * 3000}
        body = json.dumps(asked).encode()
        where, path = urllib.parse.urlsplit(self.server.url), EMBEDDINGS if embeds else TEXT
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
        with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode() + body)
            if streams and not embeds and dice.random() < 0.5:
                connection.recv(100)

    def one(self, number: int) -> None:
        """One of the mixture."""
        dice = random.Random(number)
        chance = dice.random()
        if chance < 0.08:
            self.leave(dice)
        elif chance < 0.16:
            assert self.http.send("POST", dice.choice([CHAT, TEXT]), dice.choice(BAD)).status_code == 400
        elif chance < 0.18:
            assert (
                self.http.post("/v1/adapters", {"name": "moving", "path": dice.choice(["v1", "v2"])}).status_code == 200
            )
        elif chance < 0.19:
            assert self.http.post("/v1/feedback", {"prompt": "x", "answer": "y", "rating": "up"}).status_code == 200
        else:
            path, body = dice.choice(list(self.requests()))
            assert self.ask(path, body) in self.alone[json.dumps(body)], body

    def resident_bytes(self) -> int:
        fields = Path(f"/proc/{self.server.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    home = tmp_path_factory.mktemp("soak")
    base = speaker(home / "speaker", "chatml")
    for number in (1, 2):
        adapter(base, home / "allowed" / f"v{number}", number)
    where = (f"--adapter-dir={home / 'allowed'}", f"--state-dir={home / 'state'}", f"--adapter=fixed={home}/allowed/v1")
    server = start(str(base), "--port=0", f"--api-key={KEY}", *where, "--max-sequences=6", "--pool-mib=2")
    yield Load(server)
    assert stop(server) == 0


def test_nothing_is_lost_and_nothing_is_wrong_under_mixed_load(load: Load) -> None:
    for version in ("v1", "v2"):
        assert load.http.post("/v1/adapters", {"name": "moving", "path": version}).status_code == 200
        for path, body in load.requests():
            load.alone.setdefault(json.dumps(body), set()).add(load.ask(path, body))
    sizes = [len(answers) for body, answers in load.alone.items() if json.loads(body)["model"] != "moving"]
    assert set(sizes) == {1}
    before = 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for start_at in range(0, REQUESTS, REQUESTS // 4):
            list(pool.map(load.one, range(start_at, start_at + REQUESTS // 4)))
            load.server.until(lambda: load.server.metric("requests_running") == 0)
            before = before or load.resident_bytes()
    load.server.until(lambda: load.server.metric("blocks_used") == 0)
    assert load.server.metric("requests_waiting") == 0
    assert load.server.metric("requests_failed_total") == 0
    assert load.resident_bytes() < before + (48 << 20)
    assert load.http.get("/ready").status_code == 200
    # as many models as at the beginning: replaced generations are gone
    served = sorted(model["id"] for model in load.http.get("/v1/models").json()["data"])
    assert served == ["fixed", "moving", "speaker", "v1", "v2"]
