"""What of an answer may be shown while it grows: no part of a character, and nothing that may be of a stop string."""

from collections.abc import Sequence

from ftkit import _core
from ftkit.engine.engine import Token


class Visible:
    """Takes tokens, gives text and the tokens that end in it."""

    def __init__(self, decoder: _core.StreamDecoder, stops: Sequence[str]) -> None:
        self._decoder, self._stops = decoder, stops
        self._held = ""
        self._shown = self._decoded = 0
        self._waiting: list[tuple[int, int, Token]] = []

    def push(self, tokens: Sequence[Token], *, last: bool) -> tuple[str, tuple[Token, ...], int | None]:
        """What can be seen now, its tokens, and the number of the stop string that ended the answer, if one did.

        `last`: nothing follows.
        """
        for token in tokens:
            self._take(self._decoder.push(token.id), token)
        if last:
            self._take(self._decoder.finish(), None)
        # the first to be complete wins, as in the core
        places = [
            (place + len(stop), place, number)
            for number, stop in enumerate(self._stops)
            if stop and (place := self._held.find(stop)) >= 0
        ]
        _, end, stopped = min(places, default=(0, len(self._held) - (0 if last else self._begun()), None))
        text, self._held = self._held[:end], self._held[end:]
        self._shown += len(text)
        if stopped is not None:
            out = [token for start, _, token in self._waiting if start < self._shown]
        else:
            out = [token for _, stop, token in self._waiting if last or stop <= self._shown]
        self._waiting = self._waiting[len(out) :]
        return text, tuple(out), stopped

    def _take(self, text: str, token: Token | None) -> None:
        start = self._decoded
        self._held += text
        self._decoded += len(text)
        if token is not None:
            self._waiting.append((start, self._decoded, token))
        elif self._waiting:
            self._waiting[-1] = (self._waiting[-1][0], self._decoded, self._waiting[-1][2])

    def _begun(self) -> int:
        """Characters at the end that may become a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for count in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0
