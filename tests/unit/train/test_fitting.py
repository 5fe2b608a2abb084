"""A run fits the memory it may take: by other ways to the same update, or else it is refused before it begins."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ftkit import models, train
from ftkit.cli import application
from ftkit.config import RunConfig
from ftkit.errors import FtkitError, InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import LossParts, sft
from ftkit.train import fitting, memory, planned
from ftkit.train.planned import Case, Plan, Way

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]


LAYERS = 5
PLANS: dict[Way, Plan] = {}


class Remembered(Case):
    """The case of these tests, each way of which is traced once."""

    def plan(self, way: Way) -> Plan:
        if way not in PLANS:
            PLANS[way] = super().plan(way)
        return PLANS[way]


@pytest.fixture
def case(settings: Settings) -> Case:
    """Batches of two rows through five layers."""
    config = RunConfig.from_toml(None, settings(training__batch_rows=2, data__max_tokens=256))
    case = Remembered.of_configuration(config)
    deeper = dataclasses.replace(case.architecture, layers=LAYERS)
    return dataclasses.replace(case, architecture=deeper, started_bytes=0)  # plans of all tests are compared


def test_ways_take_less_and_less_and_the_first_that_fits_is_taken(case: Case) -> None:
    ways = [Way(), Way(parts=2), Way(recomputed=LAYERS, parts=2)]
    plain, rows_alone, all_layers = map(case.plan, ways)
    assert plain.needed_bytes > rows_alone.needed_bytes > all_layers.needed_bytes
    assert fitting.fit(case, plain.needed_bytes) == [plain]
    assert fitting.fit(case, plain.needed_bytes - 1) == [plain, rows_alone]
    assert [plan.way for plan in fitting.fit(case, 0)] == ways


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_no_more_layers_are_recomputed_than_it_takes(case: Case, share: float) -> None:
    most, least = (case.plan(Way(recomputed=layers, parts=2)).needed_bytes for layers in (0, LAYERS))
    room = int(least + share * (most - least))
    plan = fitting.fit(case, room)[-1]
    assert 0 < plan.way.recomputed < LAYERS
    assert plan.needed_bytes <= room < case.plan(Way(recomputed=plan.way.recomputed - 1, parts=2)).needed_bytes


@pytest.mark.parametrize(("asked", "layers"), [(True, LAYERS), (False, 0), (4, 4), (100, LAYERS)])
def test_what_was_asked_for_is_not_changed(case: Case, asked: bool | int, layers: int) -> None:
    config = case.config.changed({"training.activation_checkpointing": asked})
    assert {plan.way.recomputed for plan in fitting.fit(dataclasses.replace(case, config=config), 0)} == {layers}


def test_at_last_a_gguf_file_is_read_for_each_product(case: Case) -> None:
    config, formats = case.config.changed({"model.quant": "gguf"}), {"model.layers.0.mlp.up_proj.weight": "q8_0"}
    case = dataclasses.replace(case, config=config, mapped_bytes=1 << 30, formats=formats)
    *others, last = fitting.fit(case, 0)
    assert not any(plan.way.streamed for plan in others)
    assert last.way == dataclasses.replace(others[-1].way, streamed=True)
    assert last.mapped_bytes == 2 * 48 * 32 * 34 // 32  # of the matrix that there is, and one as large
    assert last.needed_bytes < case.plan(dataclasses.replace(last.way, streamed=False)).needed_bytes


def test_others_change_what_is_learned_as_little_as_it_takes(settings: Settings) -> None:
    table = settings(method__name="full", data__max_tokens=512)
    config = RunConfig.from_toml(None, {k: v for k, v in table.items() if k not in ("method.rank", "method.dropout")})

    def case_of(config: RunConfig) -> Case:
        return dataclasses.replace(Case.of_configuration(config), started_bytes=0)  # this process grows meanwhile

    smallest = fitting.fit(case_of(config), 0)[-1]
    found = fitting.others(config, smallest.needed_bytes - 1, case_of)
    changed = [key for other in found for key in other.settings]
    assert {"optimizer.name", "method", "data.max_tokens"} <= set(changed)
    assert all(other.plan.needed_bytes < smallest.needed_bytes for other in found)
    assert fitting.others(config, 0, Case.of_configuration) == []


def test_a_run_that_cannot_fit_is_refused_before_it_begins(settings: Settings, tmp_path: Path) -> None:
    table = settings(training__budget="100MiB")
    with pytest.raises(InputError, match=r"training\.budget: expected .* at the least, got 100\.0 MiB"):
        train.run(RunConfig.from_toml(None, table))
    assert not Path(table["output.runs_dir"]).exists() or not list(Path(table["output.runs_dir"]).iterdir())
    words = ["train", "--model", table["model.source"], "--data", table["data.path"], "--budget", "much"]
    failed = CliRunner().invoke(application(), [*words, "--runs-dir", str(tmp_path / "none")])
    assert isinstance(failed.exception, InputError) or failed.exit_code == 2


def test_a_run_that_is_made_to_fit_says_how(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, told = [], []
    config = RunConfig.from_toml(None, settings(data__max_tokens=256, training__batch_rows=1, method__dropout=0.0))
    before = train.run(config, plain.append)
    monkeypatch.setattr(planned, "LATER_BYTES", 0)
    monkeypatch.setattr(memory, "rss_bytes", lambda: 0)
    monkeypatch.setattr(planned, "RETAINED_SHARE", 0.0)
    assert before.planned_peak_bytes is not None
    room = before.planned_peak_bytes - 1
    again = config.changed({"training.budget": str(room), "output.name": "fitted"})
    after = train.run(again, told.append)
    notices = [event["message"] for event in told if event["event"] == "notice"]
    assert any("are recomputed in the backward pass, to stay within" in text for text in notices)
    assert after.peak_bytes <= before.peak_bytes
    assert after.final_loss == before.final_loss


class Scarce:
    """A loss that finds no memory for batches of more than so many tokens, in its backward pass, after some calls."""

    def __init__(self, tokens: int, calls: int = 0) -> None:
        self.tokens, self.calls = tokens, calls
        self.failed = 0

    def __call__(self, model: Any, batch: RaggedBatch, **options: Any) -> LossParts:
        parts = self.real(model, batch, **options)
        if not is_fake(batch):
            self.calls -= 1
            if self.calls < 0 and batch.tokens.numel() > self.tokens:
                self.failed += 1
                parts.sum.register_hook(self.fail)
        return parts

    real = staticmethod(sft.loss)

    def fail(self, _: torch.Tensor) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: error 12")


@pytest.mark.parametrize("calls", [0, 8], ids=["at the rehearsal", "at the second batch of a step"])
def test_where_memory_runs_out_batches_are_cut_and_the_run_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    losses, told = [], []
    changes: dict[str, Any] = {"data__max_tokens": 256, "training__batch_rows": 2, "method__dropout": 0.0}
    changes["training__gradient_accumulation_steps"] = 2
    train.run(RunConfig.from_toml(None, settings(**changes)), losses.append)
    scarce = Scarce(140, calls)
    monkeypatch.setattr(sft, "loss", scarce)
    train.run(RunConfig.from_toml(None, settings(**changes, output__name="scarce")), told.append)
    steps = [[event["loss"] for event in events if event["event"] == "step"] for events in (losses, told)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)
    assert scarce.failed
    cut = [event["message"] for event in told if "batches are cut into" in str(event.get("message"))]
    assert len(cut) in (2, 3)  # 512 tokens into parts of at most 140, where sequences end
    assert "can't allocate memory" in cut[0]


def test_where_nothing_can_be_cut_the_run_fails_with_a_hint(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "loss", Scarce(8))
    with pytest.raises(FtkitError, match="cannot be cut further") as error:
        train.run(RunConfig.from_toml(None, settings()))
    assert error.value.hint is not None
    assert "max_tokens" in error.value.hint


def test_other_errors_stay_what_they_are(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> LossParts:
        raise RuntimeError("something else")

    made = iter([sft.loss] * 8)  # the planner's
    monkeypatch.setattr(sft, "loss", lambda *a, **k: (next(made) if is_fake(a[1]) else broken)(*a, **k))
    with pytest.raises(RuntimeError, match="something else"):
        train.run(RunConfig.from_toml(None, settings()))


def is_fake(batch: RaggedBatch) -> bool:
    return isinstance(batch.tokens, torch._subclasses.FakeTensor)


def test_a_process_that_grows_past_its_budget_cuts_its_batches(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is made to look as large as the budget allows, less half a batch."""
    plans: list[Plan] = []
    real = fitting.fit
    monkeypatch.setattr(fitting, "fit", lambda case, room: plans.append(real(case, room)[-1]) or [plans[-1]])
    monkeypatch.setattr(memory, "rss_bytes", lambda: (8 << 30) - plans[-1].batch_bytes * 3 // 4 if plans else 0)
    told: list[dict[str, Any]] = []
    changes = {"data__max_tokens": 256, "training__batch_rows": 2, "training__budget": "8GiB"}
    train.run(RunConfig.from_toml(None, settings(**changes)), told.append)
    cut = [event["message"] for event in told if "batches are cut into" in str(event.get("message"))]
    assert len(cut) == 1
    assert "8.00 GiB allowed" in cut[0]


def test_parts_are_whole_groups_and_all_of_the_batch(tiny_model: Path) -> None:
    dice = torch.Generator().manual_seed(5)
    lengths = [3, 9, 1, 4, 4, 7, 2, 6]
    rows = [torch.randint(0, 250, (length,), generator=dice).tolist() for length in lengths]
    batch = RaggedBatch.pack(rows, targets=rows, weights=[[0.5] * n for n in lengths], group=[0, 0, 1, 2, 1, 3, 3, 4])
    for count in range(1, 12):
        parts = batch.cut(count)
        assert 1 <= len(parts) <= count
        assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
        assert list(itertools.chain(*(part.lengths for part in parts))) == lengths
        assert [group for part in parts for group in part.groups] == list(batch.groups)
        seen = [set(part.groups) for part in parts]
        assert not any(a & b for a, b in itertools.combinations(seen, 2))
        assert sum(len(part.trained) for part in parts) == len(batch.trained)
    assert len(batch.cut(11)) == 4  # groups 1 and 2 are entwined
    model = models.load(tiny_model, dtype=torch.float64).model
    whole = sft.loss(model, batch)
    parts = [sft.loss(model, part) for part in batch.cut(3)]
    torch.testing.assert_close(sum(part.sum for part in parts), whole.sum)
    assert sum(part.count for part in parts) == whole.count
