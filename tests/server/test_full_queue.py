"""A queue that is full refuses over HTTP, says when to come back, and takes requests again once there is room."""

from typing import Any

import openai
import pytest
from serving import BASE, Http, Server

pytestmark = pytest.mark.server

WAITING = 12  # the server's --max-waiting
SAID: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": SAID,
    "/v1/completions": {"model": BASE, "prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"model": BASE, "input": "Hi", "max_output_tokens": 1},
    "/v1/messages": SAID,
    "/v1/embeddings": {"model": BASE, "input": "Hi"},
    "/api/chat": {"model": BASE, "messages": SAID["messages"], "stream": False, "options": {"num_predict": 1}},
}


def test_it_answers_429_and_when_to_come_back(server: Server, client: openai.OpenAI) -> None:
    def ask(count: int) -> Any:
        how: dict[str, Any] = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
        return client.completions.create(model=BASE, prompt=["Once"] * count, stream=True, **how)

    http = Http(server.url)
    server.until(lambda: server.metric("requests_running") == 0)
    before = server.metric("requests_refused_total")
    # the pool has no room for two answers of 900 tokens: all but the first wait
    streams = [ask(1)]
    server.until(lambda: server.metric("requests_running") == 1)
    streams.append(ask(WAITING))
    server.until(lambda: server.metric("requests_waiting") == WAITING)
    for path, body in ROUTES.items():
        refused = http.post(path, body)
        assert refused.status_code == 429, (path, refused.text)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert f"{WAITING} requests are waiting" in refused.text
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(**SAID)
    assert (caught.value.type, caught.value.code) == ("rate_limit_error", "queue_full")
    assert server.metric("requests_refused_total") == before + len(ROUTES) + 1
    assert server.metric("requests_waiting") == WAITING
    for stream in streams:
        stream.close()
    server.until(lambda: server.metric("requests_waiting") == server.metric("requests_running") == 0)
    for path, body in ROUTES.items():
        assert http.post(path, body).status_code == 200, path
    server.until(lambda: server.metric("blocks_used") == 0)
