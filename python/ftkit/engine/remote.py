"""A server's answers: the part of the engine's interface that a chat uses, over HTTP.

Any server with OpenAI's chat completions will do; one of ftkit's also takes ratings.
"""

import http.client
import json
import math
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from ftkit.engine.conversation import Message
from ftkit.engine.decode.retrieval import Sourced
from ftkit.engine.engine import Delta, Token
from ftkit.engine.indices import Passage
from ftkit.engine.sampling import Sampling
from ftkit.errors import FtkitError, InputError

_TIMEOUT_SECONDS = 600


class Remote:
    """A server at an address such as `http://127.0.0.1:8000`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Asks for the server's models. Raises InputError for what is no address, FtkitError when nobody answers."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url}: expected an address such as http://127.0.0.1:8000")
        self._parts, self._key = parts, api_key
        self._pieces: dict[str, int] = {}
        with self._send("GET", "/v1/models") as response:
            self.models: list[str] = [model["id"] for model in json.load(response)["data"]]
        if not self.models:
            raise FtkitError(f"{url}: expected a server with models, got none")
        self.name = self.default = self.models[0]

    def stream(self, messages: Sequence[Message], sampling: Sampling, *, model: str | None = None) -> Iterator[Delta]:
        """An answer as it grows; closing the iterator cancels it."""
        body = {
            "model": model or self.default,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed,
            # What only some servers know goes there when it is asked for.
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            **({"min_p": sampling.min_p} if sampling.min_p else {}),
            **({"repetition_penalty": sampling.repetition_penalty} if sampling.repetition_penalty != 1 else {}),
            **({"logprobs": True, "top_logprobs": sampling.logprobs} if sampling.logprobs is not None else {}),
        }
        reason, usage = "stop", {"prompt_tokens": 0, "completion_tokens": 0}
        sources: list[Passage] | None = None
        with self._send("POST", "/v1/chat/completions", body) as response:
            for event in _events(response):
                if "error" in event:
                    raise FtkitError(f"the server failed: {event['error'].get('message')}")
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    reason = choice.get("finish_reason") or reason
                    if "sources" in choice:  # a server with --retriever
                        sources = [Passage(one["source"], one["text"]) for one in choice["sources"]]
                    tokens = tuple(map(self._token, (choice.get("logprobs") or {}).get("content") or []))
                    text = choice["delta"].get("content") or ""
                    if text or tokens:
                        yield Delta(text=text, tokens=tokens)
        last: dict[str, Any] = {
            "text": "",
            "tokens": (),
            "finish_reason": reason,
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
        }
        yield Delta(**last) if sources is None else Sourced(**last, sources=tuple(sources))

    def count(self, messages: Sequence[Message], model: str | None = None) -> int:
        """How many tokens a conversation is. Raises FtkitError when the server does not tell."""
        turns = [message for message in messages if message["role"] != "system"]
        system = [message["content"] for message in messages if message["role"] == "system"]
        body = {"model": model or self.default, "messages": turns, **({"system": system[0]} if system else {})}
        with self._send("POST", "/v1/messages/count_tokens", body) as response:
            return int(json.load(response)["input_tokens"])

    def rate(self, feedback: dict[str, Any]) -> None:
        """Sends a rating. Raises FtkitError when the server takes none."""
        with self._send("POST", "/v1/feedback", feedback):
            pass

    def planned(self, name: str | None) -> dict[str, int] | None:
        """Bytes by category that the training of an adapter was planned to take, or of the newest job, if they are
        known. Raises FtkitError when the server does not tell."""
        if name is not None and name != self.name:
            job = self._asked(f"/v1/adapters/{urllib.parse.quote(name, safe='')}")["lineage"].get("job")
        else:
            job = next((job["id"] for job in self._asked("/v1/fine_tuning/jobs?limit=1")["data"]), None)
        if job is None:
            return None
        events = self._asked(f"/v1/fine_tuning/jobs/{job}/events?limit=10000")["data"]
        return next((event["data"]["planned_bytes"] for event in events if "planned_bytes" in event["data"]), None)

    def piece(self, token: int) -> str:
        """The text of a token that an answer's log-probabilities named."""
        return next(text for text, number in self._pieces.items() if number == token)

    def close(self) -> None:
        """Does nothing: the server stays."""

    def _asked(self, path: str) -> Any:
        with self._send("GET", path) as response:
            return json.load(response)

    def _token(self, shown: dict[str, Any]) -> Token:
        """A token from its text: servers do not tell ids, so each text gets a number here."""

        def number(text: str) -> int:
            return self._pieces.setdefault(text, len(self._pieces))

        top = tuple((number(other["token"]), float(other["logprob"])) for other in shown.get("top_logprobs") or [])
        logprob = float(shown["logprob"])
        return Token(id=number(shown["token"]), logprob=logprob if math.isfinite(logprob) else None, top=top)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> "_Answer":
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=_TIMEOUT_SECONDS)
        headers = {"content-type": "application/json"} | (
            {"authorization": f"Bearer {self._key}"} if self._key is not None else {}
        )
        where = f"{self._parts.scheme}://{self._parts.netloc}"
        try:
            connection.request(
                method,
                self._parts.path.rstrip("/").removesuffix("/v1") + path,
                None if body is None else json.dumps(body),
                headers,
            )
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise FtkitError(f"{where}: expected a server, got: {error}", "`ftkit serve` starts one") from None
        if response.status != 200:
            told = response.read(65536)
            connection.close()
            try:
                message = json.loads(told)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"status {response.status}"
            hint = "--api-key, or FTKIT_API_KEY" if response.status == 401 else None
            raise (InputError if response.status < 500 else FtkitError)(f"{where}: {message}", hint)
        return _Answer(connection, response)


class _Answer:
    """An answer under way, whose connection is closed with it."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response

    def __enter__(self) -> http.client.HTTPResponse:
        return self._response

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events, up to `[DONE]`. Raises FtkitError when the server leaves before."""
    try:
        for line in response:
            text = line.decode().strip()
            if text == "data: [DONE]":
                return
            if text.startswith("data: "):
                yield json.loads(text.removeprefix("data: "))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise FtkitError(f"the server left in the middle of an answer: {error}") from None
    raise FtkitError("the server left in the middle of an answer")
