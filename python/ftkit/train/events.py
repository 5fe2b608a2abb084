"""events.jsonl: what happened in a run, one JSON object a line, each on disk as soon as it happened.

Every line has `event`, `time` (seconds since 1970) and `step` (optimizer steps done). Kinds: `started`, `resumed`
(both with the planned seconds_left), `memory` (peak_bytes and peak_rss_bytes of the largest batch, planned_ of both),
`step` (loss, learning_rate, gradient_norm, tokens, trained_tokens, seconds, tokens_per_second), `evaluation` (loss),
both with `metrics` (a number by name) where the objective has some, `checkpoint`, `warning` (kind, message, hint),
`notice`, `sample` (an example's prompt, answer and moment: before or after), and at the end `finished` (the result),
`interrupted` or `failed` (message).
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftkit.train import files

Event = dict[str, Any]
Listener = Callable[[Event], None]


class Events:
    """Appends to a run's events.jsonl and tells every listener."""

    def __init__(self, path: Path | None, listeners: Sequence[Listener]) -> None:
        """Without a path nothing is written."""
        self._path = Path(os.devnull) if path is None else path
        self._listeners = listeners
        with files.disk_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def emit(self, event: str, step: int, **values: Any) -> None:
        """One event; it is flushed before anyone hears of it."""
        line: Event = {"event": event, "time": round(time.time(), 3), "step": step} | _finite(values)
        with files.disk_errors(self._path):
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        for listener in self._listeners:
            listener(line)

    def close(self) -> None:
        """Closes the file."""
        with files.disk_errors(self._path):
            self._file.close()


def _finite(values: Mapping[str, Any]) -> Event:
    """The values without NaN and infinities, which JSON does not have: None instead."""
    found: Event = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found[name] = _finite(value)
        else:
            found[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return found


def read(path: Path) -> list[Event]:
    """The events of a run; a last line that a crash cut off is left out."""
    found = []
    with files.disk_errors(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found


def rewind(path: Path, step: int) -> list[Event]:
    """Drops what came after `step` (a checkpoint; 0: there is none), so that a resumed run tells it once; the rest."""
    events = read(path) if step else []
    kept = [event for event in events if event.get("step", 0) <= step and event["event"] not in _ENDS]
    files.write_text(path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))
    return kept


_ENDS = {"finished", "interrupted", "failed"}
