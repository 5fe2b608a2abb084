"""/openapi.json is true: it has every route and no other, and what goes over the wire is what it says."""

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from managing import adapter
from schemas import problems
from serving import KEY, Answer, Http, start, stop
from speakers import speaker

pytestmark = pytest.mark.server

ROUTES = Path(__file__).parents[2] / "src" / "serve" / "http"
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
MESSAGES = [{"role": "user", "content": "x"}]
ONE: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2}


class Witness:
    """Sends requests, and holds them and their answers to the document."""

    def __init__(self, http: Http) -> None:
        self.http = http
        self.document: dict[str, Any] = http.get("/openapi.json").json()
        self.seen: set[tuple[str, str, bool]] = set()

    def __call__(self, method: str, path: str, body: Any = None, *, template: str | None = None) -> Answer:
        """`template`: the document's path, where names stand for it. Answers of errors are held to it, too."""
        operation = self.document["paths"][template or path.partition("?")[0]][method.lower()]
        headers, data = {}, None
        if body is not None:
            kind, content = next(iter(operation["requestBody"]["content"].items()))
            headers["content-type"], data = kind, json.dumps(body).encode()
            if kind == "multipart/form-data":
                headers["content-type"], data = form(body)
            elif kind == "text/plain":
                data = body.encode()
        answer = self.http.send(method, path, b"" if data is None and method == "POST" else data, headers)
        ok = answer.status_code == 200
        if ok and isinstance(body, dict) and "requestBody" in operation:
            assert not problems(body, content["schema"], self.document), (method, path)
        response = operation["responses"]["200" if ok else "default"]
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in response["content"], (method, path, answer.status_code, kind)
        if kind == "application/json":
            assert not problems(answer.json(), response["content"][kind]["schema"], self.document), (method, path)
        self.seen.add((method, template or path.partition("?")[0], ok))
        return answer


def form(fields: dict[str, str]) -> tuple[str, bytes]:
    """A form with a file; (content type, body)."""
    boundary, text = uuid.uuid4().hex, ""
    for name, value in fields.items():
        file = '; filename="rows.jsonl"' if name == "file" else ""
        text += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n{value}\r\n'
    return f"multipart/form-data; boundary={boundary}", (text + f"--{boundary}--\r\n").encode()


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witness]:
    home = tmp_path_factory.mktemp("openapi")
    base = speaker(home / "speaker", "chatml")
    adapter(base, home / "allowed" / "v1", 1)
    adapter(base, home / "allowed" / "v2", 2)
    where = (f"--adapter-dir={home / 'allowed'}", f"--state-dir={home / 'state'}")
    server = start(str(base), "--port=0", f"--api-key={KEY}", *where)
    yield Witness(Http(server.url))
    assert stop(server) == 0


def test_the_document_has_every_route_and_no_other(witness: Witness) -> None:
    there = set()
    for source in (ROUTES / "mod.rs", ROUTES / "manage.rs"):
        there |= set(re.findall(r'\.route\(\s*"([^"]+)"', source.read_text()))
    assert {path.replace("*", "") for path in there} == set(witness.document["paths"])
    for path, operations in witness.document["paths"].items():
        for method in ("GET", "POST", "DELETE", "PUT", "PATCH"):
            status = witness.http.send(method, re.sub(r"\{.*?\}", "nothing", path), b"{}").status_code
            assert (status == 405) == (method.lower() not in operations), (method, path, status)


def test_what_is_sent_is_what_the_document_says(witness: Witness) -> None:
    ask = witness
    ask("POST", "/v1/chat/completions", ONE | {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 1})
    ask("POST", "/v1/chat/completions", ONE | {"stream": True})
    ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})
    ask("POST", "/v1/responses", {"input": "x", "max_output_tokens": 2})
    ask("POST", "/v1/embeddings", {"input": ["x", "y"]})
    ask("POST", "/v1/messages", ONE)
    ask("POST", "/v1/messages/count_tokens", {"messages": MESSAGES})
    ask("POST", "/api/chat", {"messages": MESSAGES, "stream": False, "options": {"num_predict": 2}})
    ask("POST", "/api/generate", {"prompt": "x", "stream": False, "options": {"num_predict": 2}})
    ask("POST", "/api/show", {"model": "speaker"})
    ask("POST", "/markdown", "*a*")
    for path in ("/api/tags", "/api/version", "/v1/models", "/metrics", "/health", "/ready", "/openapi.json"):
        ask("GET", path)
    ask("GET", "/")
    for name in ("chat.js", "style.css"):
        ask("GET", f"/page/{name}", template="/page/{name}")
    ask("GET", "/v1/models/speaker", template="/v1/models/{name}")
    ask("POST", "/v1/adapters", {"name": "a", "path": "v1"})
    ask("POST", "/v1/adapters", {"name": "a", "path": "v2"})
    ask("POST", "/v1/adapters/a/rollback", {}, template="/v1/adapters/{name}/rollback")
    ask("GET", "/v1/adapters/a", template="/v1/adapters/{name}")
    ask("GET", "/v1/adapters")
    ask("POST", "/v1/aliases", {"name": "b", "targets": [{"model": "a", "weight": 2}, {"model": "speaker"}]})
    ask("GET", "/v1/aliases")
    ask("GET", "/v1/aliases/b", template="/v1/aliases/{name}")
    ask("DELETE", "/v1/aliases/b", template="/v1/aliases/{name}")
    ask("DELETE", "/v1/adapters/a", template="/v1/adapters/{name}")
    upload = {"file": json.dumps(ROW) + "\n", "purpose": "fine-tune"}
    file = ask("POST", "/v1/files", upload).json()["id"]
    ask("GET", "/v1/files?limit=1&purpose=fine-tune")
    ask("GET", f"/v1/files/{file}", template="/v1/files/{id}")
    ask("GET", f"/v1/files/{file}/content", template="/v1/files/{id}/content")
    jobs = "/v1/fine_tuning/jobs"
    job = ask("POST", jobs, {"model": "speaker", "training_file": file}).json()["id"]
    ask("GET", f"{jobs}/{job}", template=f"{jobs}/{{id}}")
    ask("GET", f"{jobs}?limit=1")
    ask("POST", f"{jobs}/{job}/pause", template=f"{jobs}/{{id}}/pause")
    ask("POST", f"{jobs}/{job}/resume", template=f"{jobs}/{{id}}/resume")
    ask("GET", f"{jobs}/{job}/events", template=f"{jobs}/{{id}}/events")
    ask("GET", f"{jobs}/{job}/checkpoints", template=f"{jobs}/{{id}}/checkpoints")
    ask("POST", f"{jobs}/{job}/cancel", template=f"{jobs}/{{id}}/cancel")
    ask("DELETE", f"/v1/files/{file}", template="/v1/files/{id}")
    ask("POST", "/v1/feedback", {"prompt": "x", "answer": "y", "rating": "up"})
    ask("GET", "/v1/feedback")
    every = {(method.upper(), path) for path, one in ask.document["paths"].items() for method in one}
    assert sorted(every - {(method, path) for method, path, ok in ask.seen if ok}) == []


def test_errors_are_what_the_document_says(witness: Witness) -> None:
    for path, operations in witness.document["paths"].items():
        for method, operation in operations.items():
            if operation.get("security") == [] or path in ("/metrics", "/markdown"):
                continue
            real = re.sub(r"\{.*?\}", "nothing", path)
            body = {"unknown": 1} if "requestBody" in operation else None
            answer = witness(method.upper(), real, body, template=path)
            if body is not None or "{" in path:
                assert answer.status_code in (400, 404), (method, path)
            witness.http.key, key = None, witness.http.key
            refused = witness(method.upper(), real, body, template=path)
            witness.http.key = key
            assert refused.status_code == 401, (method, path)


def test_the_checker_sees_what_is_wrong() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 1}, "b": {"anyOf": [{"const": "x"}, {"type": "null"}]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert not problems({"a": 1, "b": None}, schema, {})
    for wrong in ({}, {"a": 0}, {"a": True}, {"a": 1, "c": 1}, {"a": 1, "b": "y"}, [], {"a": 1.5}):
        assert problems(wrong, schema, {}), wrong
