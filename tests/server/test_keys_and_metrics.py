"""Who may ask for what and how much; what the server tells of itself: metrics, the access log, readiness."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from managing import adapter
from serving import Http, Server, start, stop
from speakers import speaker

from ftkit import _core
from ftkit.errors import InputError
from ftkit.serve import keys as key_file

pytestmark = pytest.mark.server

SECRET = "the words of a private question"


class Guarded:
    """A server with keys of several kinds."""

    def __init__(self, server: Server, home: Path, keys: dict[str, str]) -> None:
        self.server, self.home, self.keys = server, home, keys

    def client(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=self.keys[name], max_retries=0, timeout=60)

    def http(self, name: str) -> Http:
        return Http(self.server.url, self.keys[name])

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.home / "access.log").read_text().splitlines()]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    home = tmp_path_factory.mktemp("guarded")
    base = speaker(home / "speaker", "chatml")
    adapter(base, home / "one", 0)
    keys, file = {}, home / "keys.toml"
    for name, limits in {
        "boss": {"admin": True},
        "guest": {"models": ["one"]},
        "few-requests": {"requests_per_minute": 3.0},
        "few-tokens": {"tokens_per_minute": 60.0},
    }.items():
        keys[name], text = key_file.fresh(name, **limits)
        key_file.append(file, text)
    assert all(key not in file.read_text() for key in keys.values())
    assert file.stat().st_mode & 0o777 == 0o600
    server = start(
        str(base),
        "--port=0",
        f"--api-keys={file}",
        f"--adapter=one={home / 'one'}",
        f"--access-log={home / 'access.log'}",
        f"--state-dir={home / 'state'}",
    )
    yield Guarded(server, home, keys)
    assert stop(server) == 0


def ask(client: openai.OpenAI, model: str = "one", **how: Any) -> Any:
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": SECRET}], **how)


def test_a_key_sees_its_models_only(guarded: Guarded) -> None:
    guest = guarded.client("guest")
    assert [model.id for model in guest.models.list()] == ["one"]
    assert ask(guest, max_tokens=2).model == "one"
    for name in ("speaker", "ONE", "one@", "one:latest "):
        with pytest.raises(openai.NotFoundError):
            ask(guest, name, max_tokens=2)
    assert [model.id for model in guarded.client("boss").models.list()] == ["speaker", "one"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/adapters/none"),
        ("POST", "/v1/aliases"),
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", "/metrics"),
    ],
)
def test_only_some_keys_manage(guarded: Guarded, method: str, path: str) -> None:
    refused = guarded.http("guest").send(method, path, b"{}" if method == "POST" else None)
    assert refused.status_code == 403
    assert guarded.http("boss").send(method, path, b"{}" if method == "POST" else None).status_code != 403
    # neither case nor slashes nor escapes lead around it
    for trick in (path.upper(), f"/{path}", path.replace("/v1", "/v1/."), f"{path}/", path.replace("a", "%61")):
        assert guarded.http("guest").send(method, trick, b"{}" if method == "POST" else None).status_code in (
            403,
            404,
            405,
        )


def test_limits_hold_and_say_how_long(guarded: Guarded) -> None:
    few = guarded.http("few-requests")
    codes = [few.get("/v1/models").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    wait = int(few.get("/v1/models").headers["retry-after"])
    assert 1 <= wait <= 20
    client = guarded.client("few-tokens")
    ask(client, max_tokens=50, extra_body={"ignore_eos": True})
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 20
    assert client.models.list()


def test_whoever_leaves_pays_for_what_was_made(guarded: Guarded) -> None:
    def tokens() -> int:
        text = guarded.http("boss").get("/metrics").text
        found = re.search(r'ftkit_model_generated_tokens_total\{key="guest",model="one"\} (\d+)', text)
        return int(found[1]) if found else 0

    before = tokens()
    stream = ask(guarded.client("guest"), stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    for _ in zip(range(20), stream, strict=False):
        pass
    stream.close()
    guarded.server.until(lambda: tokens() >= before + 15)


def test_metrics_tell_everything(guarded: Guarded) -> None:
    ask(guarded.client("guest"), max_tokens=5)
    text = guarded.http("boss").get("/metrics").text
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert {
        "ftkit_first_token_seconds",
        "ftkit_inter_token_seconds",
        "ftkit_step_seconds",
        "ftkit_requests_waiting",
        "ftkit_requests_running",
        "ftkit_batch_tokens_total",
        "ftkit_blocks_used",
        "ftkit_model_requests_total",
        "ftkit_model_prompt_tokens_total",
        "ftkit_model_generated_tokens_total",
        "ftkit_requests_limited_total",
        "ftkit_http_responses_total",
    } <= names
    for line in text.splitlines():
        assert re.fullmatch(r'#.*|[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+', line), line
    assert SECRET not in text


def test_the_log_has_every_answer_and_no_contents(guarded: Guarded) -> None:
    whole = ask(guarded.client("guest"), max_tokens=4, extra_body={"ignore_eos": True})
    guarded.http("guest").get(f"/v1/models/nobody?secret={'x' * 20}")
    Http(guarded.server.url, "wrong").get("/v1/models")
    guarded.server.until(lambda: whole._request_id in (guarded.home / "access.log").read_text())
    guarded.server.until(lambda: {401, 404} <= {line["status"] for line in guarded.log()[-3:]})
    mine = next(line for line in guarded.log() if line["id"] == whole._request_id)
    assert (mine["method"], mine["path"], mine["status"], mine["key"]) == ("POST", "/v1/chat/completions", 200, "guest")
    assert (mine["model"], mine["generated_tokens"]) == ("one", 4)
    assert mine["prompt_tokens"] == whole.usage.prompt_tokens
    text = (guarded.home / "access.log").read_text()
    assert SECRET not in text
    assert "secret" not in text
    assert not any(key in text for key in guarded.keys.values())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected [[keys]]"),
        ("keys = 3", "expected [[keys]]"),
        ("[[keys]]\nname = 'a'\nhash = 'secret'", "expected blake3:"),
        (f"[[keys]]\nname = 'a'\nhash = 'blake3:{'0' * 64}'\nmodles = []", "did you mean 'models'"),
        (f"[[keys]]\nname = 'a'\nhash = 'blake3:{'0' * 64}'\nrequests_per_minute = 0", "expected at least 1"),
        (f"[[keys]]\nname = 'a'\nhash = 'blake3:{'0' * 64}'\nadmin = 'no'", "admin: expected another type"),
        (f"[[keys]]\nname = 'a b'\nhash = 'blake3:{'0' * 64}'", "name: expected"),
        (f"[[keys]]\nname = 'a'\nhash = 'blake3:{'0' * 64}'\n" * 2, "twice"),
        ("[[keys", "expected a TOML file"),
    ],
)
def test_bad_files_of_keys_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        key_file.read(tmp_path / "keys.toml")
    assert told in str(caught.value)


def test_a_hash_is_that_of_the_key() -> None:
    key, lines = key_file.fresh("a")
    assert _core.hashed_key(key) in lines
    assert key not in lines
    assert key_file.fresh("a")[0] != key


def test_a_stuck_engine_is_noticed_and_a_slow_one_is_not(tmp_path: Path) -> None:
    """A step that hangs as long as a file is there."""
    base = speaker(tmp_path / "speaker", "chatml")
    hang, script = tmp_path / "hang", tmp_path / "server.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import pathlib, sys, time
            from ftkit.cli import main
            from ftkit.engine._step import ModelStep
            whole = ModelStep.whole
            def slow(self):
                while pathlib.Path({str(hang)!r}).exists():
                    time.sleep(0.02)
                return whole.fget(self)
            ModelStep.whole = property(slow)
            sys.argv = ["ftkit", "serve", {str(base)!r}, "--port=0", "--stuck-seconds=1", "--state-dir={tmp_path}/s"]
            main()
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    server = Server(process.stderr.readline().strip(), process)
    http = Http(server.url)
    try:
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/health").status_code == 200
        time.sleep(1.1)  # a check that is younger answers the next one
        hang.touch()
        began = time.monotonic()
        assert http.get("/health").status_code == 503  # asks for a token, which does not come
        assert 0.9 < time.monotonic() - began < 10
        server.until(lambda: http.get("/ready").status_code == 503, seconds=10)
        assert "no step has ended" in http.get("/ready").json()["error"]["message"]
        began = time.monotonic()
        assert http.get("/health").status_code == 503
        assert time.monotonic() - began < 0.9  # known already
        hang.unlink()
        server.until(lambda: http.get("/ready").status_code == 200, seconds=10)
        assert http.get("/health").status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stderr.close()
