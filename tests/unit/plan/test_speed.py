"""Time from roofs: what is counted, what is kept, and that it is near what a run takes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftkit.plan import speed
from ftkit.plan.recorder import Recorder
from ftkit.plan.speed import Speeds

pytestmark = pytest.mark.unit

ROOFS = Speeds(float32=100.0, bfloat16=400.0, blocks=200.0, attention=50.0, bandwidth=10.0, disk=1.0, call=0.5)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (("float32", 1000, 20), 10.5),  # arithmetic is slower than memory
        (("float32", 1000, 200), 20.5),  # memory is
        (("bfloat16", 1000, 20), 3.0),
        (("blocks", 1000, 20), 5.5),
        (("attention", 1000, 20), 20.5),
        (("", 0, 20), 2.5),
        (("", 0, 0), 0.5),
    ],
)
def test_the_slower_roof_decides(work: tuple[str, int, int], seconds: float) -> None:
    assert ROOFS.seconds(Counter({work: 3})) == pytest.approx(3 * seconds)


def test_what_is_computed_and_moved_is_counted() -> None:
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    q = torch.ones(1, 2, 8, 4)
    with Recorder() as recorder:
        y = a @ b
        y.T.view(4, 8).add(1.0)  # views, and a copy
        (a.bfloat16() @ b.bfloat16()).sum()
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    work = recorder.work
    assert work["float32", 2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4)] == 1
    assert work["bfloat16", 2 * 8 * 16 * 4, 2 * (8 * 16 + 16 * 4 + 8 * 4)] == 1
    assert [flops for kind, flops, _ in work if kind == "attention"] == [2 * 2 * 2 * 8 * 8 * 4]
    assert sum(times for (kind, _, size), times in work.items() if not kind and size == 2 * 4 * 32) == 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "_MEASURE_SECONDS", 0.001)
    return tmp_path


def test_speeds_are_measured_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = speed.speeds()
    kept = json.loads((folder / f"machine-{torch.get_num_threads()}.json").read_text())
    assert kept["speeds"]["bandwidth"] == found.bandwidth
    kept["speeds"]["bandwidth"] = 7.0
    (folder / f"machine-{torch.get_num_threads()}.json").write_text(json.dumps(kept))
    speed._speeds.cache_clear()
    assert speed.speeds().bandwidth == 7.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)  # another machine, as it were
    assert speed.speeds().bandwidth != 7.0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": {}}', "null"])
def test_a_damaged_file_is_measured_anew(folder: Path, text: str) -> None:
    (folder / f"machine-{torch.get_num_threads()}.json").write_text(text)
    assert speed.speeds().float32 > 0
    assert json.loads((folder / f"machine-{torch.get_num_threads()}.json").read_text())["speeds"]["float32"] > 0


def test_a_cache_that_cannot_be_written_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("FTKIT_CACHE", str(folder / "file" / "inside"))
    assert speed.speeds().float32 > 0


def test_the_clearly_faster_precision_is_named() -> None:
    told = speed.advice(ROOFS, "float32")
    assert told is not None
    assert "bfloat16 2.0 times as fast as in float32; model.dtype=bfloat16" in told  # the core's products are 200
    assert speed.advice(ROOFS, "bfloat16") is None
    slow = replace(ROOFS, bfloat16=100.0)
    told = speed.advice(slow, "bfloat16")
    assert told is not None
    assert "float32 2.0 times as fast" in told
    assert speed.advice(slow, "float32") is None
    near = replace(ROOFS, bfloat16=250.0)
    assert speed.advice(near, "float32") is speed.advice(near, "bfloat16") is None
