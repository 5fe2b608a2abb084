"""Ratings of answers, kept as rows to train on: `ftkit train --data feedback:DIR`."""

import json
import os
import threading
import time
from typing import Any

from ftkit.engine import Engine
from ftkit.serve.adapters import Adapters
from ftkit.serve.fields import Fields
from ftkit.serve.refused import Refused
from ftkit.serve.state import State, fresh
from ftkit.train import files as disk

_MOST_BYTES = 4 << 30
_RATINGS = {"up": True, "good": True, 1: True, "down": False, "bad": False, 0: False, -1: False}
_LONGEST = 200_000


class Feedback:
    """The feedback of a state directory."""

    def __init__(self, engine: Engine, state: State, adapters: Adapters) -> None:
        self._engine, self._state, self._adapters = engine, state, adapters
        self._lock = threading.Lock()

    def create(self, body: dict[str, Any], caller: str) -> dict[str, Any]:
        """Keeps a rating of one answer, or of which of two is better.

        `messages` (or `prompt`, a text), `answer`, and `rating` (up or down), or `rejected`: the worse answer.
        """
        fields = Fields(body)
        prompt = _prompt(fields)
        answer = fields.text("answer", longest=_LONGEST)
        rejected, rating = fields.take("rejected"), fields.take("rating")
        model, other = fields.text("model", default=self._engine.default), fields.take("rejected_model")
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
        row |= {"model": model, "adapter": self._adapters.hash_of(model), "caller": caller, "time": int(time.time())}
        if isinstance(other, str):
            row |= {"rejected_model": other[:200], "rejected_adapter": self._adapters.hash_of(other)}
        name = fresh("feedback")
        self._append({"feedback": name} | row)
        kind = "pair" if rejected is not None else "rating"
        return {"id": name, "object": "feedback", "created_at": row["time"], "kind": kind, "adapter": row["adapter"]}

    def count(self) -> dict[str, Any]:
        """How many there are of each kind."""
        counts = {"pairs": 0, "up": 0, "down": 0}
        path = self._state.path / "feedback" / "feedback.jsonl"
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    counts["pairs" if "chosen" in row else "up" if row["label"] else "down"] += 1
        return {"object": "feedback.count", **counts}

    def _append(self, row: dict[str, Any]) -> None:
        """One line, on disk before it counts as kept."""
        path = self._state.room("feedback") / "feedback.jsonl"
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self._lock, disk.disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if size + len(line) > _MOST_BYTES:
                    raise Refused("expected room for this feedback, got a full store", status=507)
                # What a kill or a full disk left of an earlier line would spoil this one, too.
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    os.ftruncate(descriptor, _last_whole(descriptor, size))
                if os.write(descriptor, line) != len(line):
                    raise OSError(28, "no space left on device")
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
