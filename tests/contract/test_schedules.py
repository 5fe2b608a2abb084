"""Every schedule: a warm-up of its length, then between 0 and 1, never rising, defined to the last step."""

import itertools
import math

import pytest

from ftkit import plugins
from ftkit.config import Choice
from ftkit.optim import schedules

pytestmark = pytest.mark.contract

NAMES = plugins.names("optim.schedules")


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_warms_up_in_equal_parts_and_never_rises_after(name: str, warmup: int, steps: int) -> None:
    factors = [
        schedules.factor(Choice(name=name, options={"warmup_steps": warmup}), step, steps) for step in range(steps)
    ]
    rising, after = factors[:warmup], factors[warmup:]
    assert rising == [(step + 1) / min(warmup, steps) for step in range(min(warmup, steps))]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(second <= first for first, second in itertools.pairwise(after))
    assert not after or after[0] == 1


def test_their_shapes() -> None:
    def factors(name: str, **options: float) -> list[float]:
        choice = Choice(name=name, options={"warmup_share": 0.1, **options})
        return [schedules.factor(choice, step, 110) for step in range(110)][11:]

    line = [step / 99 for step in range(99)]
    assert factors("constant") == [1.0] * 99
    assert factors("linear", end=0.2) == pytest.approx([1 - 0.8 * x for x in line])
    assert factors("cosine") == pytest.approx([(1 + math.cos(math.pi * x)) / 2 for x in line])
    stable = factors("wsd", decay_share=0.25)
    assert stable[:74] == [1.0] * 74
    assert stable[-1] == pytest.approx(1 - math.sqrt((98 / 99 - 0.75) / 0.25))
