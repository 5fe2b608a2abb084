"""A job's process, as the server drives it: started, held while requests run, ended."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

POLL_SECONDS = 0.02
"""How soon training makes way for a request."""
QUIET_SECONDS = 0.5
"""How long nobody must have asked before it goes on: a conversation is not a row of small gaps."""
_LOG_BYTES = 1 << 20
_GRACE_SECONDS = 10


class Training:
    """One process of `ftkit train`. Started and driven by one thread, which must outlive it."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        """Starts it; what it says goes to `log`."""
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ftkit.serve.worker", str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,  # the terminal's Ctrl-C is the server's, which then says so here
            )
        self.held = False
        self.held_seconds = 0.0
        self._held_at = self._busy_at = 0.0

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def drive(self, busy: Callable[[], bool], leave: Callable[[], bool]) -> int | None:
        """Until it ends, with its exit code, or until `leave` says so (None). Held whenever `busy`."""
        while True:
            code = self._process.poll()
            if code is not None:
                return code
            if leave():
                return None
            now = time.monotonic()
            if busy():
                self._busy_at = now
                self._hold(now)
            elif self.held and now - self._busy_at >= QUIET_SECONDS:
                self._go(now)
            time.sleep(POLL_SECONDS)

    def end(self, *, at_once: bool = False) -> None:
        """Lets it write a checkpoint and go, or ends it `at_once`."""
        self._go(time.monotonic())
        if not at_once:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def said(self) -> str:
        """The last it said that is an error, for people."""
        with self.log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        at = [number for number, line in enumerate(lines) if line.startswith("error:")]
        told = lines[at[-1] :] if at else lines[-1:]
        return "; ".join(told)[:2000].removeprefix("error: ") or "it ended without a word"

    def _hold(self, now: float) -> None:
        if not self.held:
            self._signal(signal.SIGSTOP)
            self.held, self._held_at = True, now

    def _go(self, now: float) -> None:
        if self.held:
            self._signal(signal.SIGCONT)
            self.held_seconds += now - self._held_at
            self.held = False

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
