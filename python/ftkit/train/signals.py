"""Ctrl-C and SIGTERM: the first asks the run to stop after its step, the second stops it at once.

Python handles a signal when the call into C that it comes in has returned. Where processes train together, such a call
may be one that waits for another process, which may never answer: half an hour long, deaf to all but SIGKILL. So a
thread hears the signals there as well, and ends a process that has not handled one after a while.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEAF_SECONDS = 20.0
"""What a process may take to handle a signal; torchrun kills after 30 (`--shutdown-timeout`)."""


class Interruption:
    """A context in which `requested` turns true at the first signal; the second raises KeyboardInterrupt.

    What comes within `once_seconds` of the first is the same one: torchrun passes on what a terminal has already sent
    to all its processes. With `deaf_seconds`, a process that waits for others for longer than that after a signal, and
    than twice its longest step, ends. Off the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, once_seconds: float = 0.0, deaf_seconds: float | None = None) -> None:
        self.requested = False
        self.longest_step_seconds = 0.0
        self._deaf_seconds = deaf_seconds
        self._handled = 0
        self._ear: tuple[socket.socket, socket.socket] | None = None
        self._once_seconds = once_seconds
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
            if self._deaf_seconds is not None:
                self._ear = socket.socketpair()
                self._ear[1].setblocking(False)
                signal.set_wakeup_fd(self._ear[1].fileno(), warn_on_full_buffer=False)
                threading.Thread(target=self._listen, args=(self._ear[0], self._deaf_seconds), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._ear is not None:
            signal.set_wakeup_fd(-1)
            self._ear[1].close()  # ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (a handler's signature)
        self._handled += 1
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first >= self._once_seconds:
            raise KeyboardInterrupt

    def _listen(self, ear: socket.socket, seconds: float) -> None:
        """Ends the process some time after a signal that it doesn't handle."""
        with ear:
            seen = 0
            while heard := ear.recv(1):
                if heard[0] not in _SIGNALS:
                    continue
                until = time.monotonic() + max(seconds, 2 * self.longest_step_seconds)
                while self._handled == seen and time.monotonic() < until:
                    time.sleep(0.1)
                if self._handled == seen:
                    print("error: expected an answer of the other processes, got none since a signal", file=sys.stderr)
                    print("hint: the last checkpoint is whole; continue with ftkit train --resume", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(128 + heard[0])
                seen = self._handled
                with contextlib.suppress(BlockingIOError):  # what came before it was handled was handled with it
                    ear.recv(64, socket.MSG_DONTWAIT)
