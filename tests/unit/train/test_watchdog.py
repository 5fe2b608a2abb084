"""What the watchdog says of steps and of losses."""

import math
import random

import pytest

from ftkit.errors import FtkitError
from ftkit.train.watchdog import Watchdog, never_moved

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("trained", "loss", "norm", "kind"),
    [
        (0, math.nan, 0.0, "nothing_trained"),
        (5, math.nan, 1.0, "loss_not_finite"),
        (5, math.inf, math.nan, "loss_not_finite"),
        (5, 1.0, math.nan, "gradient_not_finite"),
        (5, 1.0, math.inf, "gradient_not_finite"),
        (5, 1.0, 0.0, "gradient_zero"),
        (5, 0.0, 1e-30, None),
    ],
)
def test_names_what_is_wrong_with_a_step(trained: int, loss: float, norm: float, kind: str | None) -> None:
    warning = Watchdog(3).judge(7, trained, loss, norm)
    assert (warning.kind if warning else None) == kind
    assert warning is None or ("step 7" in warning.message and warning.hint)


def test_only_bad_steps_in_a_row_end_a_run() -> None:
    watchdog = Watchdog(3)
    for _ in range(5):
        watchdog.judge(1, 5, math.nan, 1.0)
        watchdog.judge(1, 5, math.nan, 1.0)
        assert watchdog.judge(1, 5, 1.0, 1.0) is None
    watchdog.judge(1, 5, math.nan, 1.0)
    watchdog.judge(2, 5, 1.0, 0.0)
    with pytest.raises(FtkitError, match="stopped after 3 bad steps in a row: step 3: expected a finite loss, got nan"):
        watchdog.judge(3, 5, math.nan, 1.0)
    assert watchdog.bad_steps == 13


@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_a_loss_that_moves_less_than_its_noise_never_moved(slope: float) -> None:
    for seed in range(20):
        noise = random.Random(seed)
        losses = [3 - slope * step + noise.gauss(0, 0.01) for step in range(60)]
        if slope:
            assert never_moved(losses) is None
        else:
            warning = never_moved(losses)
            assert warning is None or "loss to fall" in warning.message
    assert never_moved([2.0] * 12) is not None
    assert never_moved([2.0, 3.0, 4.0, 5.0] * 4) is not None
    assert never_moved([2.0] * 11) is None  # too few to say
