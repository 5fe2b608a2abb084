"""Ratings of answers, kept as rows to train on: `ftkit train --data feedback:DIR`."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftkit.engine import Engine
from ftkit.serve.adapters import Adapters
from ftkit.serve.fields import Fields
from ftkit.serve.refused import Refused
from ftkit.serve.state import State, fresh
from ftkit.train import files as disk

FILE = "feedback.jsonl"
_MOST_BYTES = 4 << 30
_RATINGS = {"up": True, "good": True, 1: True, "down": False, "bad": False, 0: False, -1: False}
_LONGEST = 200_000


class Feedback:
    """The feedback of a state directory."""

    def __init__(self, engine: Engine, state: State, adapters: Adapters) -> None:
        self._engine, self._state, self._adapters = engine, state, adapters

    def create(self, body: dict[str, Any], caller: str) -> dict[str, Any]:
        """Keeps a rating of one answer, or of which of two is better; see `row_of`."""
        row = row_of(body, self._engine.default, self._adapters.hash_of) | {"caller": caller}
        name = fresh("feedback")
        keep(self._state.room("feedback") / FILE, {"feedback": name} | row)
        kind = "pair" if "chosen" in row else "rating"
        return {"id": name, "object": "feedback", "created_at": row["time"], "kind": kind, "adapter": row["adapter"]}

    def count(self) -> dict[str, Any]:
        """How many there are of each kind."""
        counts = {"pairs": 0, "up": 0, "down": 0}
        path = self._state.path / "feedback" / FILE
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    counts["pairs" if "chosen" in row else "up" if row["label"] else "down"] += 1
        return {"object": "feedback.count", **counts}


def row_of(body: dict[str, Any], default: str, hash_of: Callable[[str], str | None]) -> dict[str, Any]:
    """A row of feedback from what a client says. Raises Refused for what is none.

    `messages` (or `prompt`, a text), `answer`, and `rating` (up or down), or `rejected`: the worse answer. `default` is
    the model that answered where none is named, `hash_of` gives the content behind a name.
    """
    fields = Fields(body)
    prompt = _prompt(fields)
    answer = fields.text("answer", longest=_LONGEST)
    rejected, rating = fields.take("rejected"), fields.take("rating")
    model, other = fields.text("model", default=default), fields.text("rejected_model", default="")
    row: dict[str, Any] = {"prompt": prompt}
    if (rejected is None) == (rating is None):
        raise Refused("expected a rating, or a rejected answer, got both or neither", param="rating")
    if rejected is not None:
        if not isinstance(rejected, str) or len(rejected) > _LONGEST or rejected == answer:
            raise fields.wrong("rejected", "another answer", rejected)
        row |= {"chosen": answer, "rejected": rejected}
    else:
        if isinstance(rating, bool) or not isinstance(rating, str | int) or rating not in _RATINGS:
            raise fields.wrong("rating", "up or down", rating)
        row |= {"completion": answer, "label": _RATINGS[rating]}
    for name in ("id", "system_fingerprint", "comment"):
        value = fields.text(name, longest=2000, default="")
        if value:
            row[name] = value
    fields.finish()
    row |= {"model": model, "adapter": hash_of(model), "time": int(time.time())}
    if other:
        row |= {"rejected_model": other, "rejected_adapter": hash_of(other)}
    return row


def keep(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file of feedback, on disk before it counts. Raises InputError when the place refuses."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with disk.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # a server and a chat may keep feedback at the same time
            size = os.fstat(descriptor).st_size
            if size + len(line) > _MOST_BYTES:
                raise Refused("expected room for this feedback, got a full store", status=507)
            # What a kill or a full disk left of an earlier line would spoil this one, too.
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.ftruncate(descriptor, _last_whole(descriptor, size))
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, "no space left on device")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _last_whole(descriptor: int, size: int) -> int:
    """Where the last whole line ends."""
    at = size
    while at > 0:
        start = max(0, at - 65536)
        found = os.pread(descriptor, at - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def _prompt(fields: Fields) -> str | list[dict[str, str]]:
    """What was asked: messages, or a text."""
    messages, prompt = fields.take("messages"), fields.take("prompt")
    if isinstance(prompt, str) and messages is None and 0 < len(prompt) <= _LONGEST:
        return prompt
    if prompt is not None or not isinstance(messages, list) or not 0 < len(messages) <= 1000:
        raise fields.wrong("messages", "1 to 1000 messages, or a text as prompt", messages)
    kept = []
    for number, message in enumerate(messages):
        whole = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not whole or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise fields.wrong(f"messages[{number}]", "a role and a text as content", message)
        kept.append({"role": message["role"], "content": message["content"]})
    return kept
