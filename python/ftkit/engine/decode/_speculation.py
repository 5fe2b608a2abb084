"""Writing and retrieving by turns, with and without guesses; what is written is the same.

A **segment** is what is written under the same passages. `plain` asks the index before every segment. `speculative`
guesses the passages from those that it has seen for this answer, writes on, and has the index verify several guesses in
one call, during which it may write one segment more:

    seen     {d₁ d₇ d₃}                 every retrieval adds its best `PREFETCH`
    guesses  d₁   d₁   d₇ │ d₇          the best of those seen, by the index's own scores
    written  ▇▇▇  ▇▇▇  ▇▇▇│ ▇▇▇         each segment under its guess
    index    d₁   d₁   d₃ ┘             the first wrong guess: it and what follows is dropped, and written under d₃

What is yielded was written under what the index says, so both give the same segments as long as `write` and the index
are functions of their arguments.

Source: Zhang et al., Accelerating Retrieval-Augmented Language Model Serving with Speculation, 2024, arXiv 2401.14021,
algorithm 1.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeAlias

from ftkit.engine.decode._stride import Stride
from ftkit.engine.engine import Token
from ftkit.engine.indices import Index

PREFETCH = 256
"""Passages that a retrieval brings into the cache: the larger of the paper's two. Of 300,000 passages, 20 made 23 of 30
guesses right, 256 made 29; BM25 ranks so many in a millisecond."""
MOST_SEEN = 2048
"""Passages in the cache; those that were found longest ago leave it."""

Ids: TypeAlias = tuple[int, ...]
"""Passages by number, the best first."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Some tokens of an answer, written under the same passages."""

    passages: Ids
    tokens: tuple[Token, ...]
    """Without an end token."""
    reason: str | None = None
    """Why the answer ended with it, if it did."""
    generated: int = 0
    """Tokens that were generated, the end token included."""
    usage: tuple[int, int] = (0, 0)
    """Tokens of the prompt, and how many of them were in the pool."""


Write: TypeAlias = Callable[[Ids, Sequence[int], Callable[[], bool]], Segment | None]
"""The segment under these passages after these tokens; None when the function, asked now and then, says to give up."""
Ask: TypeAlias = Callable[[Sequence[int]], Any]
"""The index's query after these tokens of the answer."""


@dataclass(frozen=True)
class _Draft:
    query: Any
    segment: Segment


def plain(index: Index, ask: Ask, write: Write, count: int, pool: Executor) -> Iterator[Segment]:
    """Segments until the answer ends, each under the `count` best passages; the index works in the pool's thread."""
    answer: list[int] = []
    while True:
        # as many as `speculative` asks for: rounding in a search may depend on how many are wanted
        (best,) = pool.submit(index.search, [ask(answer)], max(PREFETCH, count)).result()
        segment = _written(write, tuple(best[:count]), answer)
        answer += _ids(segment)
        yield segment
        if segment.reason is not None:
            return


def speculative(index: Index, ask: Ask, write: Write, count: int, pool: Executor, stride: Stride) -> Iterator[Segment]:
    """The segments of `plain`, with fewer waits for the index."""
    state = _State(index, ask, write, count, pool, stride)
    while True:
        length, overlap = stride.best
        if not state.drafts and (length == 0 or not state.seen):
            segments = [state.asked_first()]
        else:
            segments = state.guessed(max(1, length), overlap)
        yield from segments
        if segments and segments[-1].reason is not None:
            return


class _State:
    """An answer that grows by what is verified, and what is written beyond it."""

    def __init__(self, index: Index, ask: Ask, write: Write, count: int, pool: Executor, stride: Stride) -> None:
        self._index, self._ask, self._write, self._count = index, ask, write, count
        self._pool, self._stride = pool, stride
        self._most = max(PREFETCH, count)
        self._answer: list[int] = []
        self.seen: dict[int, None] = {}  # a set in the order of its making
        self.drafts: list[_Draft] = []

    def asked_first(self) -> Segment:
        """A segment without a guess; what would have been guessed is compared all the same."""
        query = self._ask(self._answer)
        (found,) = self._pool.submit(self._search, [query], beside=False).result()
        best = tuple(found[: self._count])
        if self.seen and not self._stride.hopeless:
            self._stride.verified(int(self._guess(query) == best), 1)
        return self._corrected(best, [found])

    def guessed(self, length: int, overlap: bool) -> list[Segment]:
        """What is right of `length` segments under guesses, and the one after a wrong guess under what is right."""
        drafts = self.drafts
        while len(drafts) < length and not _ended(drafts):
            drafts += self._drafted(lambda: False, beside=False)
        overlap = overlap and not _ended(drafts)
        verification = self._pool.submit(self._search, [made.query for made in drafts], beside=overlap)

        def wrong() -> bool:
            return verification.done() and self._right(verification.result()) < len(drafts)

        more = self._drafted(wrong, beside=True) if overlap else []
        found = verification.result()
        right = self._right(found)
        self._stride.verified(right, len(drafts))
        segments = [made.segment for made in drafts[:right]]
        for segment in segments:
            self._answer += _ids(segment)
        self.drafts = more
        if right < len(drafts):
            self.drafts = []
            return [*segments, self._corrected(tuple(found[right][: self._count]), found)]
        self._take(found)
        return segments

    def _drafted(self, give_up: Callable[[], bool], *, beside: bool) -> list[_Draft]:
        """One more segment under a guess; none when told to give up."""
        begin = time.perf_counter()
        tokens = self._answer + [token for made in self.drafts for token in _ids(made.segment)]
        query = self._ask(tokens)
        segment = self._write(self._guess(query), tokens, give_up)
        if segment is None:
            return []
        self._stride.costs.took("segment", time.perf_counter() - begin, beside=beside)
        return [_Draft(query, segment)]

    def _corrected(self, passages: Ids, found: Sequence[Sequence[int]]) -> Segment:
        """The segment under passages that the index has named."""
        self._take(found)
        begin = time.perf_counter()
        segment = _written(self._write, passages, self._answer)
        self._stride.costs.took("segment", time.perf_counter() - begin, beside=False)
        self._answer += _ids(segment)
        return segment

    def _guess(self, query: Any) -> Ids:
        return tuple(self._index.rank(query, list(self.seen))[: self._count])

    def _search(self, queries: Sequence[Any], *, beside: bool) -> list[list[int]]:
        begin = time.perf_counter()
        found = self._index.search(queries, self._most)
        self._stride.costs.took("verification", time.perf_counter() - begin, beside=beside)
        return found

    def _take(self, found: Sequence[Sequence[int]]) -> None:
        for ids in found:
            for number in ids:
                self.seen.pop(number, None)  # the newest are the last
                self.seen[number] = None
        for number in list(self.seen)[: len(self.seen) - MOST_SEEN]:
            del self.seen[number]

    def _right(self, found: Sequence[Sequence[int]]) -> int:
        """Guesses before the first wrong one."""
        for number, (made, ids) in enumerate(zip(self.drafts, found, strict=True)):
            if made.segment.passages != tuple(ids[: self._count]):
                return number
        return len(self.drafts)


def _ended(drafts: Sequence[_Draft]) -> bool:
    return bool(drafts) and drafts[-1].segment.reason is not None


def _ids(segment: Segment) -> list[int]:
    return [token.id for token in segment.tokens]


def _written(write: Write, passages: Ids, answer: Sequence[int]) -> Segment:
    segment = write(passages, answer, lambda: False)
    assert segment is not None  # nobody says to give up
    return segment
