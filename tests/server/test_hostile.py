"""What strangers send: broken HTTP, broken bodies, other sites' pages, callers that leave. The server goes on."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import BASE, KEY, Server, start, stop

pytestmark = pytest.mark.server

CHAT = "/v1/chat/completions"


def raw(server: Server, data: bytes, *, close_write: bool = False) -> bytes:
    """Sends bytes and reads until the server closes."""
    address = urllib.parse.urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if close_write:
                connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    return answer


def request(
    server: Server, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """A request on its own connection: the status and the JSON of the answer."""
    host = urllib.parse.urlsplit(server.url).netloc
    lines = {"Host": host, "Authorization": f"Bearer {KEY}", "Content-Length": str(len(body)), "Connection": "close"}
    lines |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    answer = raw(server, f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
    top, _, rest = answer.partition(b"\r\n\r\n")
    with contextlib.suppress(ValueError):
        return int(top.split()[1]), json.loads(rest)
    return int(top.split()[1]), None


MESSAGES = "/v1/messages"
POSTS = [CHAT, "/v1/completions", "/v1/responses", MESSAGES, "/v1/embeddings", "/api/chat", "/api/generate"]


def is_error(path: str, document: Any) -> bool:
    """Whether it is an error in the shape of the path's API."""
    if path.startswith(MESSAGES):
        return set(document) == {"type", "error"} and set(document["error"]) == {"type", "message"}
    if path.startswith("/api/"):
        return set(document) == {"error"} and isinstance(document["error"], str)
    return set(document["error"]) == {"message", "type", "param", "code"}


def alive(server: Server) -> None:
    assert request(server, "GET", "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", CHAT, b"", 400),
        ("POST", CHAT, b"{", 400),
        ("POST", CHAT, b"[]", 400),
        ("POST", CHAT, b'{"messages": "\xff\xfe"}', 400),
        ("POST", CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("POST", CHAT, b'{"messages": ' + b"[" * 50_000, 400),
        ("POST", CHAT, b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', 400),
        ("POST", "/v1/completions", b'{"prompt": []}', 400),
        ("POST", "/v1/completions", b'{"prompt": [1.5]}', 400),
        ("POST", "/v1/completions", b'{"prompt": [4294967296]}', 400),
        ("POST", "/v1/completions", b'{"prompt": ""}', 400),
        ("POST", "/v1/completions", b'{"prompt": "x", "echo": true}', 400),
        ("POST", CHAT, b"x" * (5 << 20), 413),
        *(("POST", path, b'{"model": ', 400) for path in POSTS),
        *(("POST", path, b"x" * (5 << 20), 413) for path in POSTS[2:]),
        *(("DELETE", path, b"", 405) for path in POSTS),
        ("POST", "/v1/messages/count_tokens", b"{}", 400),
        ("POST", "/api/show", b"[]", 400),
        ("POST", "/api/nothing", b"{}", 404),
        ("GET", CHAT, b"", 405),
        ("POST", "/v1/models", b"", 405),
        ("OPTIONS", CHAT, b"", 405),
        ("GET", "/v1/models/nobody", b"", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", b"", 404),
        ("GET", "/v1", b"", 404),
        ("GET", "//v1/models", b"", 404),
        ("GET", "/V1/MODELS", b"", 404),
        ("POST", "/markdown", b"\xff", 400),
    ],
)
def test_bad_requests_get_their_status(server: Server, method: str, path: str, body: bytes, status: int) -> None:
    found, document = request(server, method, path, body)
    # A body over the limit may be cut off before the answer is read.
    assert found == status
    assert is_error(path, document)


@pytest.mark.parametrize(
    "path",
    [
        "/api/tags",
        "/api/chat",
        "/v1/responses",
        "/v1/embeddings",
        CHAT,
        "/v1/completions",
        "/v1/models",
        "/metrics",
        "/markdown",
        "/v1/models/one",
    ],
)
@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer \xe9"])
def test_no_route_opens_without_the_key(server: Server, path: str, value: str | None) -> None:
    headers = {"Authorization": value} if value is not None else {"Authorization": "", "X-Api-Key": KEY}
    status, _ = request(server, "GET", path, headers=headers)
    assert status == (400 if value == "Bearer \xe9" else 401)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_sites_pages_are_kept_out(server: Server, headers: dict[str, str], status: int) -> None:
    assert request(server, "GET", "/v1/models", headers=headers)[0] == status


def test_the_own_page_may_ask_and_no_other_site_is_ever_allowed(server: Server) -> None:
    host = urllib.parse.urlsplit(server.url).netloc
    answer = raw(
        server,
        f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nOrigin: {server.url}\r\nAuthorization: Bearer {KEY}\r\n"
        "Connection: close\r\n\r\n".encode(),
    )
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"access-control" not in answer.lower()


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
    ],
)
def test_broken_http_is_refused(server: Server, data: bytes) -> None:
    answer = raw(server, data, close_write=True)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:80]
    alive(server)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "model",
    "messages",
    "prompt",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "tools",
    "tool_choice",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "input",
    "instructions",
    "text",
    "system",
    "thinking",
    "stop_sequences",
    "format",
    "options",
    "think",
    "raw",
    "dimensions",
    "encoding_format",
    "best_of",
    "echo",
    "user",
]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.sampled_from(POSTS))
def test_any_fields_are_answered_or_refused(server: Server, fields: dict[str, Any], path: str) -> None:
    body = {**VALID[path], **fields}
    status, document = request(server, "POST", path, json.dumps(body).encode("utf-8", "surrogatepass"))
    assert status in (200, 400, 404, 429)
    assert status == 200 or is_error(path, document)


MESSAGE = [{"role": "user", "content": "x"}]
FEW = {"options": {"num_predict": 1}}
VALID: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGE, "max_tokens": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    MESSAGES: {"messages": MESSAGE, "max_tokens": 1},
    "/v1/embeddings": {"input": "x"},
    "/api/chat": {"messages": MESSAGE, **FEW},
    "/api/generate": {"prompt": "x", **FEW},
}


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(POSTS))
def test_any_bytes_are_refused(server: Server, body: bytes, path: str) -> None:
    assert request(server, "POST", path, body)[0] == 400


def test_a_caller_who_does_not_wait_is_forgotten(server: Server) -> None:
    cancelled = server.metric("requests_cancelled_total")
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}).encode()
    address = urllib.parse.urlsplit(server.url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.until(lambda: server.metric("blocks_used") > 0)
    server.until(lambda: server.metric("blocks_used") == 0)
    assert server.metric("requests_cancelled_total") == cancelled + 1
    alive(server)


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(server: Server) -> None:
    host = urllib.parse.urlsplit(server.url).netloc
    page = Path(__file__).parents[2] / "src" / "serve" / "http" / "page"
    files = [path.name for path in page.iterdir() if path.suffix in (".js", ".css")]
    assert len(files) > 5
    for path in ("/", *(f"/page/{name}" for name in files)):
        answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"content-security-policy: default-src 'none'" in head.lower()
        assert b"http://" not in body
        assert b"https://" not in body


def test_a_port_in_use_is_exit_code_2(server: Server, smollm2: Path) -> None:
    port = str(urllib.parse.urlsplit(server.url).port)
    command = [sys.executable, "-m", "ftkit", "serve", str(smollm2), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert "hint:" in done.stderr


def test_a_signal_lets_answers_finish_and_the_second_does_not(smollm2: Path) -> None:
    server = start(str(smollm2), "--port=0", "--pool-mib=64")
    body = json.dumps({"model": BASE, "prompt": "Once", "max_tokens": 25, "stream": True, "ignore_eos": True}).encode()
    address = urllib.parse.urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        answer = connection.recv(65536)
        server.process.send_signal(signal.SIGTERM)
        while part := connection.recv(65536):
            answer += part
    assert b"data: [DONE]" in answer
    assert server.process.wait(20) == 0
    server = start(str(smollm2), "--port=0", "--pool-mib=64")
    body = body.replace(b'"max_tokens": 25', b'"max_tokens": 900')
    head = head.replace(str(len(body) - 1), str(len(body)))
    thread = threading.Thread(target=raw, args=(server, head.encode() + body))
    thread.start()
    server.until(lambda: server.metric("blocks_used") > 0)
    server.process.send_signal(signal.SIGTERM)
    assert stop(server) == 0
    thread.join()
