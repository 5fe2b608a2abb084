"""The HTTP layer alone: requests a second with a step that computes nothing, the load made on the same processors.

A request is a whole one: key, JSON, tokens, a turn in the scheduler, a sampled token, text, JSON. The goal is 5,000 a
second, so that it is never what a model on a CPU waits for.
"""

import json
import multiprocessing
import os
import select
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from bench._figures import line
from ftkit import _core

GOAL = 5000.0
ROUNDS, SECONDS, CONNECTIONS, SEQUENCES = 3, 4.0, 64, 64
VOCABULARY = 257


class _Nothing:
    """A step whose logits are all the same."""

    whole = None

    def __init__(self) -> None:
        self.logits = torch.zeros(512, VOCABULARY)

    def __call__(self, _tokens: int, _blocks: int, rows: int, *_: object) -> Tensor:
        return self.logits[:rows]


def run() -> list[dict[str, Any]]:
    """Requests a second: completions of one token, and chat completions of eight in a stream."""
    listener = _core.Listener("127.0.0.1", 0)
    found: dict[str, list[float]] = {}

    def measure() -> None:
        try:
            for name, path, body in _BODIES:
                found[name] = [_asked(listener.url, path, body) for _ in range(ROUNDS)]
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    sizes = {"tokens": 512, "rows": 512, "blocks": 4}
    room = (sizes["tokens"], sizes["tokens"], SEQUENCES + 1, SEQUENCES, SEQUENCES * sizes["blocks"], sizes["rows"])
    engine = _core.Engine(
        _tokenizer(),
        None,
        _Nothing(),
        [torch.zeros(count, dtype=torch.int32) for count in room],
        name="nothing",
        content="nothing",
        batch_tokens=sizes["tokens"],
        sequences=SEQUENCES,
        waiting=1024,
        block_tokens=16,
        pages=SEQUENCES * sizes["blocks"],
        page_bytes=1,
        context_tokens=16 * sizes["blocks"],
        draft_tokens=0,
        draft_model=False,
        vocabulary=VOCABULARY,
    )
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        engine.serve(
            listener,
            threading.Thread(target=measure).start,
            "nothing",
            body_bytes=1 << 20,
            upload_bytes=1 << 20,
            stuck_seconds=60,
            api_key="key",
        )
    finally:
        signal.signal(signal.SIGINT, before)
        engine.close()
    return [line(name, "requests/s, the goal", rates, [GOAL] * ROUNDS) for name, rates in found.items()]


_BODIES = [
    ("completions of 1 token", "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 1}),
    (
        "completions of 8 tokens, streamed",
        "/v1/completions",
        {"prompt": "Once upon a time", "max_tokens": 8, "stream": True, "ignore_eos": True},
    ),
]


def _tokenizer() -> _core.Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
        return _core.Tokenizer.from_dir(folder)


def _asked(url: str, path: str, body: dict[str, Any]) -> float:
    """Requests a second that a process of its own gets answered."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_load, args=(theirs, url, path, json.dumps(body)))
    process.start()
    rate = ours.recv()
    process.join()
    return float(rate)


def _load(answer: Any, url: str, path: str, body: str) -> None:
    """Keeps connections busy for some seconds, one request each at a time."""
    host, port = url.removeprefix("http://").split(":")
    request = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer key\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    poll, connections = select.epoll(), {}
    for _ in range(CONNECTIONS):
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(connection, select.EPOLLIN)
        connections[connection.fileno()] = (connection, bytearray())
        connection.sendall(request)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        for number, _ in poll.poll(0.1):
            connection, seen = connections[number]
            seen += connection.recv(65536)
            if _whole(seen):
                assert seen.startswith(b"HTTP/1.1 200"), bytes(seen[:400])
                seen.clear()
                done += 1
                connection.sendall(request)
    answer.send(done / (time.perf_counter() - start))


def _whole(seen: bytearray) -> bool:
    """Whether an answer is there to its end."""
    head = seen.find(b"\r\n\r\n")
    if head < 0:
        return False
    length = seen.lower().find(b"content-length:", 0, head)
    if length < 0:  # in chunks, the last of which is empty
        return seen.endswith(b"\r\n0\r\n\r\n")
    return len(seen) >= head + 4 + int(seen[length + 15 : seen.index(b"\r\n", length)])
