"""The model of speed: its bounds, its fit, and what `ftkit doctor --gpu` makes of both."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from bench import _kernels
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.cuda.emulated import Emulated
from tests.unit.cuda.fake_driver import FakeDriver
from torch import Tensor
from typer.testing import CliRunner

from ftkit.cli import application
from ftkit.cuda.driver import Driver
from ftkit.cuda.speed import OVERLAP, Counts, Gpu, counts, fitted, power_mean
from ftkit.errors import GateError
from ftkit.kernels import _gpu_trial

pytestmark = pytest.mark.unit

A100 = Gpu("A100", "sm_80", 108, 1.41, 1555, 312)
CLOCKS = st.lists(st.floats(0, 1e4), min_size=1, max_size=4).filter(any)


@given(CLOCKS, st.floats(1, 20), st.floats(1, 20))
def test_pipes_overlap_from_not_at_all_to_wholly(clocks: list[float], one: float, other: float) -> None:
    less, more = sorted((one, other))
    slack = 1 + 1e-9
    assert max(clocks) <= power_mean(clocks, more) * slack
    assert power_mean(clocks, more) <= power_mean(clocks, less) * slack
    assert power_mean(clocks, less) <= sum(clocks) * slack
    assert math.isclose(power_mean(clocks, 1.0), sum(clocks))
    assert power_mean(clocks, math.inf) == max(clocks)
    assert math.isclose(power_mean([3.0, 4.0], 2.0), 5.0)


@given(st.sampled_from([1.0, 1.5, 1.87, 3.0]))
def test_the_fit_finds_the_overlap_that_made_the_shares(overlap: float) -> None:
    points = [
        (clocks, clocks[0], clocks[0] / power_mean(clocks, overlap))
        for clocks in ([2.0, 1.0, 1.5], [8.0, 3.0, 1.0], [4.0, 4.0, 0.5])
    ]
    assert fitted(points) == pytest.approx(overlap, abs=0.011)


def test_the_overlap_is_what_public_kernels_fit() -> None:
    points = [(one.clocks, one.tensor, one.measured) for one in _kernels.CALIBRATION]
    assert fitted(points) == OVERLAP
    assert max(map(abs, _kernels.errors())) < 0.15, "what the others foretell of one"


def test_rates_become_clocks() -> None:
    assert A100.product_clocks == pytest.approx(2.0, rel=0.01), "an A100's multiprocessor takes 2 clocks for an mma"
    assert A100.bytes_per_clock == pytest.approx(10.2, rel=0.01)
    assert Counts(8, 0, 0, 0, 0).share(A100) == pytest.approx(1.0)
    assert Counts(0, 4 * 100, 0, 0, 1021).share(A100, math.inf) == pytest.approx(1.0, rel=0.01)
    assert Counts(0, 0, 2 * 100, 0, 1021).share(A100, 1.0) == pytest.approx(0.5, rel=0.01), "64 lanes"
    assert Counts(0, 0, 0, 0, 100, again=50).share(A100) == pytest.approx(2 / 3)
    for of_architectures in counts().values():
        assert set(of_architectures) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
        assert all(0 < one.share(A100) < 1 for one in of_architectures.values())


def clock(factor: float) -> Callable[[Sequence[Callable[[], Tensor]]], list[float]]:
    return lambda runs: [factor * (place + 1) for place, _ in enumerate(runs)]


def test_a_report_of_a_machine_that_overlaps_otherwise(kit: Emulated) -> None:
    """Times that an overlap of 2.5 foretells are fitted by it."""
    cases = list(_gpu_trial.cases(kit.launcher(), "cpu", 128))
    known = [case for case in cases if _gpu_trial.foretold(case, A100) is not None]
    assert {case.name for case in known} >= {"coded_gemv", "coded_decode", "coded_forward", "coded_dx", "rope"}
    measured = [(case, _gpu_trial.foretold(case, A100, 2.5) or 0.0) for case in known]
    assert _gpu_trial.overlap_of(measured, A100) == pytest.approx(2.5, abs=0.011)
    assert _gpu_trial.overlap_of([], A100) is None
    for case in known:
        slow, fast = _gpu_trial.foretold(case, A100, 1.0), _gpu_trial.foretold(case, A100, math.inf)
        assert slow is not None
        assert fast is not None
        assert fast < slow
    assert _gpu_trial.foretold(known[0], Gpu("new", "sm_150", 1, 1.0, 1.0, 1.0)) is None


def test_the_report_is_written_and_says_what_is_wrong(
    kit: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [case for case in _gpu_trial.cases(kit.launcher(), "cpu", 128) if case.name in ("rope", "cross_entropy")]
    found = _gpu_trial.tried(cases, A100, clock(10.0))
    monkeypatch.setattr(_gpu_trial, "report", lambda: found)
    result = CliRunner().invoke(application(), ["doctor", "--gpu", "--out", str(tmp_path / "report")])
    assert result.exit_code == 0
    assert json.loads((tmp_path / "report" / "gpu.json").read_text()) == found
    text = (tmp_path / "report" / "gpu.txt").read_text()
    assert text == result.stdout
    assert "A100, sm_80: 108 multiprocessors, 1.41 GHz" in text
    assert f"overlap of pipes: {OVERLAP} foretold" in text
    rope = next(one for one in found["kernels"] if one["kernel"] == "rope")
    assert (rope["microseconds"], rope["torch_microseconds"], rope["bitsandbytes_microseconds"]) == (10.0, 20.0, None)
    found["kernels"][0]["passed"] = False
    result = CliRunner().invoke(application(), ["doctor", "--gpu", "--json"])
    assert isinstance(result.exception, GateError)
    assert f"got others from {found['kernels'][0]['kernel']}" in str(result.exception)


def test_the_clock_is_the_drivers() -> None:
    assert Driver(FakeDriver({}), "cpu", lambda _: 0).gigahertz(torch.device("cuda", 0)) == 1.41
