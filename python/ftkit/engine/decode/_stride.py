"""How many segments to write on guesses before asking the index whether the guesses were right.

With `a` the seconds of a segment, `b` those of a verification and γ the share of guesses that are right, `s` guesses in
a row bring (1 − γˢ) / (1 − γ) segments: those before the first wrong guess, and one more for which the right passages
are known then. They take

    γˢ · [(s − 1) a + max(a, b)] + (1 − γˢ) · [s a + b + a]       where the next segment is written during verification
    γˢ · [s a + b]               + (1 − γˢ) · [s a + b + a]       where it is not

and the stride is the `s` with the most segments a second. `s = 0` asks before every segment, 1 / (a + b).

Source: Zhang et al., Accelerating Retrieval-Augmented Language Model Serving with Speculation, 2024, arXiv 2401.14021,
§4.2. There a wrong guess does not cost the `a` of writing its segment anew; with it, asking first can win, as it does
where retrieval is quick.
"""

from collections import deque
from statistics import fmean

WINDOW = 5
"""Rounds from which is estimated; the paper's."""
MOST_CERTAIN = 0.6
"""Most of γ that is believed: a few lucky rounds must not lead to a long stride. The paper's."""
LONGEST = 16
"""Longest stride that is looked at; no optimum under `MOST_CERTAIN` is beyond it unless b is 400 a."""


def rate(stride: int, a: float, b: float, right: float, *, overlap: bool) -> float:
    """Segments a second; `right` is γ, 0 to 1, a and b in seconds."""
    if stride == 0:
        return 1.0 / (a + b)
    segments = sum(right**i for i in range(stride))
    hit = (stride - 1) * a + max(a, b) if overlap else stride * a + b
    miss = stride * a + b + a
    all_right = right**stride
    return segments / (all_right * hit + (1.0 - all_right) * miss)


class Stride:
    """Estimates of the last rounds, and the stride that they lead to."""

    def __init__(self, *, overlap: bool = True, fixed: int | None = None) -> None:
        """`overlap`: the next segment is written during verification; `fixed`: always this stride."""
        self._overlap, self._fixed = overlap, fixed
        self._segments: deque[float] = deque(maxlen=WINDOW)
        self._verifications: deque[float] = deque(maxlen=WINDOW)
        self._guesses: deque[tuple[int, bool]] = deque(maxlen=WINDOW)

    def wrote(self, seconds: float) -> None:
        """A segment took so long."""
        self._segments.append(seconds)

    def asked(self, seconds: float) -> None:
        """The index took so long, for however many queries."""
        self._verifications.append(seconds)

    def verified(self, right: int, guesses: int) -> None:
        """So many of so many guesses in a row were right before the first wrong one."""
        self._guesses.append((right, right < guesses))

    @property
    def certainty(self) -> float:
        """γ: of the guesses whose outcome counted, the share that was right, at most `MOST_CERTAIN`."""
        right = sum(count for count, _ in self._guesses)
        wrong = sum(missed for _, missed in self._guesses)
        return min(MOST_CERTAIN, right / (right + wrong)) if right + wrong else MOST_CERTAIN

    @property
    def best(self) -> int:
        """The stride of the next round."""
        if self._fixed is not None:
            return self._fixed
        if not self._segments or not self._verifications:
            return 1
        a, b, right = fmean(self._segments), fmean(self._verifications), self.certainty
        return max(range(LONGEST + 1), key=lambda stride: rate(stride, a, b, right, overlap=self._overlap))
