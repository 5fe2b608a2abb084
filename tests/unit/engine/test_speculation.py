"""Guessing passages changes no token: toy models and indices, and guesses as bad as can be."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.engine.decode._speculation import Ids, Segment, plain, speculative
from ftkit.engine.decode._stride import Stride
from ftkit.engine.engine import Token

pytestmark = pytest.mark.unit

DOCUMENTS = 40


class Toy:
    """A model and an index, both functions of their arguments alone; and a count of what was asked of them."""

    def __init__(self, seed: int, *, length: int = 60, locality: int = 4, adversary: int | None = None) -> None:
        self.seed, self.length, self.locality, self.adversary = seed, length, locality, adversary
        self.searches = self.written = 0
        self.seconds = 0.0

    def query(self, answer: Sequence[int]) -> int:
        # changes every `locality` segments, so that passages come again
        return random.Random(f"{self.seed} {len(answer) // (4 * self.locality)} {sum(answer[:3])}").randrange(1 << 30)

    def order(self, query: int) -> list[int]:
        scores = random.Random(query)
        return sorted(range(DOCUMENTS), key=lambda _: scores.random())

    def search(self, queries: Sequence[int], count: int) -> list[list[int]]:
        self.searches += 1
        time.sleep(self.seconds)
        return [self.order(query)[:count] for query in queries]

    def rank(self, query: int, passages: Sequence[int]) -> list[int]:
        if self.adversary is not None:
            return random.Random(self.adversary + query).sample(list(passages), len(passages))
        place = {number: index for index, number in enumerate(self.order(query))}
        return sorted(passages, key=place.__getitem__)

    def write(self, passages: Ids, answer: Sequence[int], give_up: Callable[[], bool]) -> Segment | None:
        found: list[Token] = []
        for _ in range(4):
            self.written += 1
            if give_up():
                return None
            text = [*answer, *(token.id for token in found)]
            if len(text) >= self.length:
                return Segment(passages=passages, tokens=tuple(found), reason="stop", generated=len(found) + 1)
            drawn = random.Random(f"{self.seed} {passages} {text}").randrange(1000)
            found.append(Token(drawn, None, ()))
        return Segment(passages=passages, tokens=tuple(found), generated=4)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def sequential(toy: Toy, count: int, pool: ThreadPoolExecutor) -> list[Segment]:
    return list(plain(toy, toy.query, toy.write, count, pool))


def guessing(
    toy: Toy, count: int, pool: ThreadPoolExecutor, stride: int | None = None, *, overlap: bool = True
) -> list[Segment]:
    chosen = Stride(overlap=overlap, fixed=stride)
    return list(speculative(toy, toy.query, toy.write, count, pool, chosen))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    stride=st.sampled_from([0, 1, 2, 3, 8, None]),
    overlap=st.booleans(),
    count=st.integers(1, 3),
    length=st.integers(0, 70),
    adversary=st.none() | st.integers(0, 99),
)
def test_the_same_segments_whatever_is_guessed(
    pool: ThreadPoolExecutor, seed: int, stride: int | None, overlap: bool, count: int, length: int, adversary: int
) -> None:
    expected = sequential(Toy(seed, length=length), count, pool)
    toy = Toy(seed, length=length, adversary=adversary)
    assert guessing(toy, count, pool, stride, overlap=overlap) == expected
    assert toy.searches <= len(expected)


def test_fewer_searches_where_passages_come_again(pool: ThreadPoolExecutor) -> None:
    toys = [(Toy(seed, length=160), Toy(seed, length=160)) for seed in range(50)]
    for first, second in toys:
        assert sequential(first, 1, pool) == guessing(second, 1, pool, 3)
    ours, theirs = (sum(toy.searches for toy in side) for side in ((b for _, b in toys), (a for a, _ in toys)))
    assert ours < 0.6 * theirs


def test_a_wrong_guess_is_given_up_while_it_is_written(pool: ThreadPoolExecutor) -> None:
    class Slow(Toy):
        def write(self, passages: Ids, answer: Sequence[int], give_up: Callable[[], bool]) -> Segment | None:
            time.sleep(0.005)  # so that the index is done first
            return super().write(passages, answer, give_up)

    toy = Slow(5, length=80, locality=1, adversary=1)
    segments = guessing(toy, 1, pool, 1)
    drafted = toy.written - sum(len(segment.tokens) for segment in segments)
    # each round drops a draft of 4 tokens; the one during verification is dropped at once
    assert drafted <= 6 * len(segments)


def test_a_slow_index_is_asked_less_often(pool: ThreadPoolExecutor) -> None:
    first, second = (Toy(3, length=160, locality=20) for _ in range(2))
    second.seconds = 0.02
    assert guessing(second, 1, pool) == sequential(first, 1, pool)
    assert second.searches < first.searches / 2


def test_a_failing_index_fails_the_answer(pool: ThreadPoolExecutor) -> None:
    class Broken(Toy):
        def search(self, queries: Sequence[int], count: int) -> list[list[int]]:
            if self.searches == 2:
                raise OSError("the disk is gone")
            return super().search(queries, count)

    for answer in (sequential, guessing):
        with pytest.raises(OSError, match="gone"):
            answer(Broken(1), 1, pool)
