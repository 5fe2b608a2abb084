"""The live line of a run on standard error: it rewrites itself on a terminal; elsewhere a line now and then."""

import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

_PLAIN_SECONDS = 5.0
_SHOWN_METRICS = 2


class ProgressLine:
    """Listens to the events of a run and shows them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._steps = 0
        self._before: str | None = None
        self._shown = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        """Shows an event."""
        match event["event"]:
            case "started" | "resumed":
                self._steps = event["steps"]
                left = event.get("seconds_left")
                time_left = "" if left is None else f", about {duration(left)}"
                self._say(f"{event['run']}: {event['event']}, {event['summary']}{time_left}")
            case "reading":
                self._reading(event["rows"])
            case "step":
                self._step(event)
            case "memory":
                self._say(_memory(event))
            case "evaluation":
                best = " (best so far)" if event["best"] else ""
                parts = [f"evaluation loss {_number(event['loss'], 4)}{best}", *_metrics(event)]
                self._say(f"step {event['step']}: {' · '.join(parts)}")
            case "warning" | "notice":
                hint = f" ({event['hint']})" if event.get("hint") else ""
                self._say(f"{event['event']}: {event['message']}{hint}", style="yellow")
            case "sample":
                self._sample(event)
            case "finished":
                self.close()
                self._say(f"{event['run']}: done, {event['steps']} steps, adapter in {event['adapter']}")
            case "interrupted":
                self.close()

    def close(self) -> None:
        """Leaves the last line standing and gives the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _step(self, event: dict[str, Any]) -> None:
        line = describe(event, self._steps)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=8)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif event["step"] in (1, self._steps) or time.monotonic() - self._shown >= _PLAIN_SECONDS:
            self._shown = time.monotonic()
            self._say(line)

    def _sample(self, event: dict[str, Any]) -> None:
        """The first example, at the end."""
        if event["number"] == 0 and event["moment"] == "before":
            self._before = event["answer"]
        elif event["number"] == 0:
            self.close()
            before = f"\n  before: {_line(self._before)}" if self._before is not None else ""
            self._say(f"example: {_line(event['prompt'])}{before}\n  after:  {_line(event['answer'])}")

    def _reading(self, rows: int) -> None:
        if time.monotonic() - self._shown >= _PLAIN_SECONDS:
            self._shown = time.monotonic()
            self._say(f"reading data: {rows:,} rows so far")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))


def _memory(event: dict[str, Any]) -> str:
    """What the largest batch took, beside what was planned."""
    took, planned = (event[f"{kind}peak_bytes"] / 2**30 for kind in ("", "planned_"))
    process = event["planned_peak_rss_bytes"] / 2**30
    return f"memory: {took:.2f} GiB of tensors in the largest batch, planned {planned:.2f} (process: {process:.2f})"


def describe(event: dict[str, Any], steps: int) -> str:
    """A step's event as one line: loss, the objective's first numbers, real tokens a second, memory, time left."""
    parts = [
        f"step {event['step']}/{steps}",
        f"loss {_number(event['loss'], 4)}",
        *_metrics(event),
        f"{event['tokens_per_second']:,.0f} tokens/s",
        f"{event['rss_bytes'] / 2**30:.2f} GiB",
        f"{duration(event['seconds_left'])} left",
    ]
    return " · ".join(parts)


def _metrics(event: dict[str, Any]) -> list[str]:
    """The first few of the objective's own numbers: a line has no room for more."""
    told = list(event.get("metrics", {}).items())[:_SHOWN_METRICS]
    return [f"{name.replace('_', ' ')} {_number(value, 3)}" for name, value in told]


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3:05, 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _line(text: str) -> str:
    """Text on one line, cut where a terminal would wrap."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:99] + "…"


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
