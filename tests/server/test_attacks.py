"""What brought other servers down or open, tried here. `docs/security.md` names the source of each."""

import contextlib
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import KEY, Http, Server, start, stop
from speakers import speaker

from ftkit import _core
from ftkit.errors import FtkitError

pytestmark = pytest.mark.server

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("target")
    base = speaker(home / "speaker", "qwen2_5")
    server = start(str(base), "--port=0", f"--api-key={KEY}", f"--state-dir={home / 'state'}", "--max-waiting=300")
    yield server
    assert stop(server) == 0


def alive(server: Server) -> None:
    assert Http(server.url).get("/health").status_code == 200


def ask(server: Server, **fields: Any) -> int:
    return Http(server.url).post(CHAT, {"messages": MESSAGES, "max_tokens": 4} | fields).status_code


def raw(server: Server, text: str) -> int:
    """The status of a request that is written by hand."""
    where = urllib.parse.urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as connection:
        connection.sendall(text.encode())
        answer = b""
        while b"\r\n" not in answer and (part := connection.recv(4096)):
            answer += part
    return int(answer.split()[1]) if answer else 0


@pytest.fixture
def listener() -> Iterator[tuple[str, list[Any]]]:
    """A place that nobody must call; who did."""
    calls: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        ending = threading.Event()

        def listen() -> None:
            while not ending.is_set():
                with contextlib.suppress(TimeoutError):
                    calls.append(server.accept())

        thread = threading.Thread(target=listen)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", calls
        ending.set()
        thread.join()


def test_no_address_or_file_of_a_request_is_ever_read(target: Server, listener: tuple[str, list[Any]]) -> None:
    place, calls = listener
    for url in (f"http://{place}/x.png", f"https://{place}/", f"ftp://{place}/", "file:///etc/passwd", "/etc/passwd"):
        for part in (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url}},
            {"type": "file", "file": {"file_data": url}},
            {"type": "video_url", "video_url": {"url": url}},
        ):
            assert ask(target, messages=[{"role": "user", "content": [part]}]) == 400
        schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$ref": url}}}
        assert ask(target, response_format=schema) == 400
        for field in ("chat_template", "model_path", "lora_path", "documents"):
            assert ask(target, **{field: url}) == 400
        assert ask(target, model=url) == 404
        http = Http(target.url)
        for body in ({"name": "x", "path": url}, {"name": "x", "url": url}, {"name": "x", "path": [url]}):
            assert http.post("/v1/adapters", body).status_code == 400
        assert http.post("/api/chat", {"messages": [MESSAGES[0] | {"images": [url]}]}).status_code == 400
    time.sleep(0.1)
    assert calls == []


DEEP: Any = {}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}
SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "(?<=x)y"},
    {"type": "string", "pattern": "((a{0,1000}){0,1000}){0,1000}"},
    {"type": "something"},
    {"type": ["string", 7]},
    {"type": 7},
    {"properties": 7},
    {"enum": []},
    {"enum": "x"},
    {"$ref": "#/definitions/nothing"},
    {"$ref": "#"},
    {"anyOf": []},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "array", "minItems": 10**12},
    {"type": "array", "items": {"type": "string", "minLength": 10**9}},
    {"type": "object", "minProperties": 10**18},
    {"type": "number", "minimum": 1e308, "maximum": -1e308},
    {"type": "string", "format": "no-such-format"},
    {"type": "object", "patternProperties": {"[": {}}},
    {"const": {"a": [None] * 5000}},
    {"anyOf": [{"type": "string", "pattern": f"a{{{n},99}}b"} for n in range(99)]},
    DEEP,
    {"type": "object", "properties": {str(n): {"type": "string"} for n in range(3000)}},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_no_schema_brings_the_server_down_or_holds_it_up(target: Server, schema: Any) -> None:
    began = time.monotonic()
    chosen = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for fields in ({"response_format": chosen}, {"tools": [tool], "tool_choice": "required"}):
        assert ask(target, **fields) in (200, 400)
    assert time.monotonic() - began < 15
    alive(target)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_discard": -1},
        {"n_keep": -5},
        {"max_tokens": -(2**63)},
        {"n": -1},
        {"top_k": -7},
        {"seed": 2**70},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {str(2**33): 1}},
        {"top_logprobs": -1, "logprobs": True},
        {"prompt_embeds": "AAAA"},
        {"messages": [{"role": "user", "content": "x"}] * 5000},
        {"stop": [""] * 3},
        {"stop": ["x" * 10**5]},
        {"guided_json": {"type": "x"}},
        {"lora": [{"id": -1, "scale": 1e308}]},
    ],
)
def test_numbers_and_fields_out_of_range_are_refused(target: Server, fields: dict[str, Any]) -> None:
    assert ask(target, **fields) == 400
    alive(target)


TRICKS = [
    "GET /v1/models HTTP/1.1\r\nHost: {host}\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}/health\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}?/health\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}#/health\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}/openapi.json?x=\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}/#@elsewhere.example\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: user@{host}\r\n",
    "GET http://{host}/v1/models HTTP/1.1\r\nHost: {host}\r\n",
    "GET http://{host}/health/../v1/models HTTP/1.1\r\nHost: {host}\r\n",
    "GET /health/../v1/models HTTP/1.1\r\nHost: {host}\r\n",
    "GET /health;/v1/models HTTP/1.1\r\nHost: {host}\r\n",
    "GET /health%2f..%2fv1%2fmodels HTTP/1.1\r\nHost: {host}\r\n",
    "GET /V1/models HTTP/1.1\r\nHost: {host}\r\n",
    "GET /v1/models/ HTTP/1.1\r\nHost: {host}\r\n",
    "GET //v1/models HTTP/1.1\r\nHost: {host}\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nX-Original-URL: /health\r\nX-Forwarded-Path: /\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nX-HTTP-Method-Override: OPTIONS\r\n",
    "OPTIONS /v1/models HTTP/1.1\r\nHost: {host}\r\n",
    "HEAD /v1/models HTTP/1.1\r\nHost: {host}\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nAuthorization: bearer\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {upper}\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nAuthorization: Bearer x\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nX-Api-Key: {key}\r\n",
    "GET /v1/models?api_key={key} HTTP/1.1\r\nHost: {host}\r\n",
    "GET /v1/models HTTP/1.1\r\nHost: {host}\r\nCookie: key={key}\r\n",
]


@pytest.mark.parametrize("head", TRICKS)
def test_no_trick_with_host_path_or_header_opens_a_route(target: Server, head: str) -> None:
    assert tried(target, head) in (0, 400, 401, 403, 404, 405)


def test_nor_where_any_host_may_ask(tmp_path: Path) -> None:
    """On loopback `Host` is checked before the key: here it is not."""
    base = speaker(tmp_path / "speaker", "qwen2_5")
    server = start(str(base), "--port=0", "--host=0.0.0.0", f"--api-key={KEY}", f"--state-dir={tmp_path / 'state'}")
    for head in TRICKS:
        assert tried(server, head) in (0, 400, 401, 404, 405), head
    assert raw(server, f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n") == 200
    assert stop(server) == 0


def tried(server: Server, head: str) -> int:
    host = urllib.parse.urlsplit(server.url).netloc
    text = head.format(host=host, key=KEY, upper=KEY.upper())
    return raw(server, f"{text}Connection: close\r\n\r\n")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('touch /tmp/x').read() }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ messages.append.__self__.__class__ }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}{{ x }}",
        "{% extends '/etc/passwd' %}",
        "{{ range(999999999) | list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999 }}",
        "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_models_template_reaches_nothing_and_ends(source: str) -> None:
    began = time.monotonic()
    try:
        text = _core.ChatTemplate.from_source(source).render(MESSAGES)
    except FtkitError:
        text = ""
    assert len(text) < 1 << 20
    assert not any(word in text for word in ("class", "root:", "uid=", "posix"))
    assert time.monotonic() - began < 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MANAGED: dict[str, dict[str, Any]] = {
    "/v1/adapters": {"name": "x", "path": "y", "checkpoint": "z"},
    "/v1/adapters/x/rollback": {"generation": 1},
    "/v1/aliases": {"name": "x", "targets": [{"model": "speaker", "weight": 1}]},
    "/v1/fine_tuning/jobs": {
        "model": "speaker",
        "training_file": "file-1",
        "method": {},
        "hyperparameters": {},
        "seed": 1,
    },
    "/v1/feedback": {"messages": MESSAGES, "answer": "a", "rating": "up", "rejected": "b", "model": "m", "id": "i"},
    "/v1/files": {},
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(MANAGED)), st.data())
def test_any_body_of_what_is_managed_is_done_or_refused(target: Server, path: str, data: st.DataObject) -> None:
    fields = MANAGED[path]
    changed = data.draw(st.dictionaries(st.sampled_from([*fields, "other"]), JSON, max_size=3))
    body = json.dumps(fields | changed).encode("utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        body = data.draw(st.binary(max_size=60))
    answer = Http(target.url).send("POST", path, body, {"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404, 409), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["x", "a'b", "-", "--"]))
def test_any_form_is_refused(target: Server, body: bytes, boundary: str) -> None:
    head = {"content-type": f"multipart/form-data; boundary={boundary}"}
    assert Http(target.url).send("POST", "/v1/files", body, head).status_code == 400


def test_callers_that_dawdle_hold_nobody_up(target: Server) -> None:
    """Half a head, half a body, a stream that nobody reads: 150 of them."""
    where = urllib.parse.urlsplit(target.url)
    auth = f"Host: {where.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
    stream = json.dumps({"prompt": "x", "max_tokens": 3000, "stream": True, "ignore_eos": True})
    form = "Content-Type: multipart/form-data; boundary=x"
    slow = [
        f"POST {CHAT} HTTP/1.1\r\n{auth}X-Slow: ",
        f"POST {CHAT} HTTP/1.1\r\n{auth}Content-Length: 100\r\n\r\n{{",
        f"POST /v1/files HTTP/1.1\r\n{auth}{form}\r\nContent-Length: 9\r\n\r\n--x",
    ]
    connections = []
    try:
        for number in range(150):
            connection = socket.create_connection((where.hostname, where.port), timeout=20)
            connections.append(connection)
            connection.sendall(slow[number % 3].encode())
        deaf = socket.create_connection((where.hostname, where.port), timeout=20)
        connections.append(deaf)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.sendall(f"POST /v1/completions HTTP/1.1\r\n{auth}Content-Length: {len(stream)}\r\n\r\n{stream}".encode())
        began = time.monotonic()
        for _ in range(10):
            assert ask(target) == 200
        assert time.monotonic() - began < 10
    finally:
        for connection in connections:
            connection.close()
    target.until(lambda: target.metric("blocks_used") == 0)
    alive(target)
