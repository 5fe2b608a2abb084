"""How many segments to write on guesses before asking the index whether the guesses were right.

With `a` the seconds of a segment, `b` those of a verification and γ the share of guesses that are right, `s` guesses in
a row bring (1 − γˢ) / (1 − γ) segments: those before the first wrong guess, and one more for which the right passages
are known then. They take

    γˢ · [s a + b]                 + (1 − γˢ) · [s a + b + a]     where nothing is written during verification
    γˢ · [(s − 1) a + max(a′, b′)] + (1 − γˢ) · [s a + b′ + a]    where the next segment is

and what is done is what brings the most segments a second. `s = 0` asks before every segment, 1 / (a + b). a′ and b′
are the seconds of a segment and a verification beside one another: as long as each alone where the index computes
elsewhere, up to twice as long where both want the same cores.

Source: Zhang et al., Accelerating Retrieval-Augmented Language Model Serving with Speculation, 2024, arXiv 2401.14021,
§4.2. There a wrong guess does not cost the `a` of writing its segment anew, and a′ = a, b′ = b; with them, asking
first can win, as it does where retrieval is quick.
"""

from collections import deque
from typing import Literal

WINDOW = 5
"""Rounds from which is estimated; the paper's."""
FIRST_GUESS = 0.6
"""γ before anything is known; the paper's bound."""
FIRST_GUESSES = 2
"""As many guesses `FIRST_GUESS` counts as: a few lucky rounds must not lead to a long stride, and many may."""
LEAST_GAIN = 1.1
"""Guessing is given up where guesses that are all right would bring less: making and comparing them takes time, too."""
LONGEST = 16
"""Longest stride that is looked at: more can't be verified in one pass over an index for the price of one."""
_SHARE = 2 / (WINDOW + 1)
"""Of the newest time in a mean that forgets as a window does."""


def rate(stride: int, a: float, b: float, right: float, *, beside: tuple[float, float] | None = None) -> float:
    """Segments a second; `right` is γ, 0 to 1, a and b in seconds, `beside`: (a′, b′) where a segment is written
    during verification."""
    if stride == 0:
        return 1.0 / (a + b)
    segments = sum(right**i for i in range(stride))
    hit = stride * a + b if beside is None else (stride - 1) * a + max(beside)
    miss = stride * a + (b if beside is None else beside[1]) + a
    all_right = right**stride
    return segments / (all_right * hit + (1.0 - all_right) * miss)


class Costs:
    """What segments and verifications took lately, alone and beside one another. One for all answers from an index."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, bool], float] = {}

    def took(self, what: Literal["segment", "verification"], seconds: float, *, beside: bool) -> None:
        """A segment or a verification took so long; `beside`: while there was the other."""
        mean = self._means.get((what, beside), seconds)
        self._means[what, beside] = mean + _SHARE * (seconds - mean)

    def of(self, *, beside: bool) -> tuple[float, float] | None:
        """(a, b), or (a′, b′): those alone where these are not known yet. None before the first of each."""
        found = [
            self._means.get((what, beside), self._means.get((what, False))) for what in ("segment", "verification")
        ]
        a, b = found
        return None if a is None or b is None else (a, b)


class Stride:
    """What was guessed right in the last rounds of an answer, and what to do in the next."""

    def __init__(self, costs: Costs | None = None, *, overlap: bool = True, fixed: int | None = None) -> None:
        """`overlap`: a segment may be written during verification; `fixed`: always this stride, and overlap if so."""
        self.costs = Costs() if costs is None else costs
        self._overlap, self._fixed = overlap, fixed
        self._guesses: deque[tuple[int, bool]] = deque(maxlen=WINDOW)

    def verified(self, right: int, guesses: int) -> None:
        """So many of so many guesses in a row were right before the first wrong one."""
        self._guesses.append((right, right < guesses))

    @property
    def certainty(self) -> float:
        """γ: of the guesses whose outcome counted, the share that was right; `FIRST_GUESS` counts as some of them."""
        right = sum(count for count, _ in self._guesses)
        wrong = sum(missed for _, missed in self._guesses)
        return (right + FIRST_GUESS * FIRST_GUESSES) / (right + wrong + FIRST_GUESSES)

    @property
    def hopeless(self) -> bool:
        """Whether guesses could not pay if all of them were right, so that none need be compared either."""
        alone = self.costs.of(beside=False)
        if self._fixed is not None or alone is None:
            return False
        ways = [None, self.costs.of(beside=True)] if self._overlap else [None]
        most = max(rate(stride, *alone, 1.0, beside=way) for stride in range(1, LONGEST + 1) for way in ways)
        return most < LEAST_GAIN * rate(0, *alone, 1.0)

    @property
    def best(self) -> tuple[int, bool]:
        """The stride of the next round, and whether to write during its verification."""
        if self._fixed is not None:
            return self._fixed, self._overlap and self._fixed > 0
        alone = self.costs.of(beside=False)
        if alone is None:
            return 1, False
        (a, b), right = alone, self.certainty
        beside = self.costs.of(beside=True) if self._overlap else None
        ways = [(rate(stride, a, b, right), stride, False) for stride in range(LONGEST + 1)]
        if beside is not None:
            ways += [(rate(stride, a, b, right, beside=beside), stride, True) for stride in range(1, LONGEST + 1)]
        _, stride, overlap = max(ways, key=lambda way: way[0])
        return stride, overlap
