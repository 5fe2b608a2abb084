"""The stride is the one with the most segments a second, from what the last rounds took and guessed right."""

import itertools

import pytest

from ftkit.engine.decode._stride import FIRST_GUESS, LONGEST, WINDOW, Costs, Stride, rate

pytestmark = pytest.mark.unit


def taught(a: float, b: float, right: int, wrong: int, *, overlap: bool = False) -> Stride:
    stride = Stride(overlap=overlap)
    stride.costs.took("segment", a, beside=False)
    stride.costs.took("verification", b, beside=False)
    for _ in range(right):
        stride.verified(1, 1)
    for _ in range(wrong):
        stride.verified(0, 1)
    return stride


def test_rates_by_hand() -> None:
    # asking first: 1 s to write, 10 s to ask
    assert rate(0, 1, 10, 0.6) == pytest.approx(1 / 11)
    # one guess: right 0.6 of the time, 1 + 10; else 1 + 10 and 1 to write anew; one segment either way
    assert rate(1, 1, 10, 0.6) == pytest.approx(1 / (0.6 * 11 + 0.4 * 12))
    # two: 1 + 0.6 segments
    assert rate(2, 1, 10, 0.6) == pytest.approx(1.6 / (0.36 * 12 + 0.64 * 13))
    # while the next is written: one second less where all is right
    assert rate(2, 1, 10, 0.6, beside=(1, 10)) == pytest.approx(1.6 / (0.36 * 11 + 0.64 * 13))
    assert rate(1, 3, 1, 1.0, beside=(3, 1)) == pytest.approx(1 / 3)
    # beside one another both take longer
    assert rate(2, 1, 10, 0.6, beside=(2, 15)) == pytest.approx(1.6 / (0.36 * 16 + 0.64 * 18))


def test_the_paper_s_optimum() -> None:
    # (1 − γˢ) / ((1 − γ)(s a + b)) is largest at 4 for (a, b, γ) = (1, 10, 0.6), and so is ours
    theirs = {s: (1 - 0.6**s) / (0.4 * (s + 10)) for s in range(1, LONGEST + 1)}
    assert max(theirs, key=lambda s: theirs[s]) == 4
    assert taught(1, 10, 3, 2).best == (4, False)


def test_it_asks_first_where_asking_costs_nothing_or_guesses_are_wrong() -> None:
    assert taught(1, 0.001, 5, 0).best == taught(1, 0.001, 5, 0, overlap=True).best == (0, False)
    assert taught(1, 2, 0, 5).best == taught(1, 2, 0, 5, overlap=True).best == (0, False)


def test_where_no_guess_could_pay_none_is_compared() -> None:
    assert not Stride().hopeless
    assert not Stride(fixed=1).hopeless
    for b, hopeless in ((0.05, True), (0.5, False)):
        for right in (0, 5):
            assert taught(1, b, right, 5 - right, overlap=True).hopeless == hopeless


def test_it_grows_with_the_price_of_asking_and_with_certainty() -> None:
    for overlap in (False, True):
        by_price = [taught(1, b, 3, 2, overlap=overlap).best[0] for b in (0.01, 0.1, 1, 3, 10, 30, 100)]
        assert by_price == sorted(by_price)
        assert by_price[0] == 0
        assert by_price[-1] > 4
        by_certainty = [taught(1, 10, right, 5 - right, overlap=overlap).best[0] for right in range(6)]
        assert by_certainty == sorted(by_certainty)


def test_it_writes_during_verification_where_that_was_quicker() -> None:
    for beside, expected in (((1.1, 3.1), True), ((4.0, 8.0), False)):
        stride = taught(1, 3, 5, 0, overlap=True)
        assert stride.best[1]  # not known yet: as if the index computed elsewhere
        stride.costs.took("segment", beside[0], beside=True)
        stride.costs.took("verification", beside[1], beside=True)
        assert stride.best[1] == expected
        assert Stride(stride.costs, overlap=True).best[1] == expected  # what one answer learned, the next one knows


def test_times_are_those_of_the_last_rounds() -> None:
    costs = Costs()
    assert costs.of(beside=False) is None
    for seconds in (100.0, *[1.0] * 20):
        costs.took("segment", seconds, beside=False)
        costs.took("verification", 2 * seconds, beside=False)
    assert costs.of(beside=False) == costs.of(beside=True) == pytest.approx((1, 2), rel=0.05)


def test_certainty_is_of_guesses_that_counted_in_the_last_rounds() -> None:
    stride = Stride()
    assert stride.certainty == pytest.approx(FIRST_GUESS)
    stride.verified(1, 4)  # one right, one wrong, of two it is not known
    assert stride.certainty == pytest.approx((1 + 2 * FIRST_GUESS) / 4)
    stride.verified(0, 3)
    assert stride.certainty == pytest.approx((1 + 2 * FIRST_GUESS) / 5)
    for _ in range(WINDOW):
        stride.verified(3, 3)
    assert stride.certainty == pytest.approx((15 + 2 * FIRST_GUESS) / 17)


def test_the_optimum_is_no_worse_than_any_neighbour() -> None:
    for a, b, right, overlap in itertools.product((0.5, 2), (0.1, 1, 7, 40), (1, 2, 3), (False, True)):
        stride = taught(a, b, right, 5 - right, overlap=overlap)
        best, beside = stride.best
        ways = [(a, b)] if overlap else []
        rates = {
            (s, way is not None): rate(s, a, b, stride.certainty, beside=way)
            for way in (None, *ways)
            for s in range(LONGEST + 1)
        }
        assert rates[best, beside] == max(rates.values())
        assert best < LONGEST
