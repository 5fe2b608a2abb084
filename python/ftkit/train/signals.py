"""Ctrl-C and SIGTERM: the first asks the run to stop after its step, the second stops it at once."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context in which `requested` turns true at the first signal; the second raises KeyboardInterrupt.

    What comes within `once_seconds` of the first is the same one: torchrun passes on what a terminal has already sent
    to all its processes. Off the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, once_seconds: float = 0.0) -> None:
        self.requested = False
        self._once_seconds = once_seconds
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a handler's signature)
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first >= self._once_seconds:
            raise KeyboardInterrupt
