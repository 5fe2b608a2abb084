"""A run from its configuration to its directory, on a tiny model: what it leaves, what it refuses, what stops it."""

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftkit import adapters, models, train
from ftkit.config import RunConfig
from ftkit.data import Dataset, prepare
from ftkit.errors import FtkitError, InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import sft
from ftkit.train import checkpoints, directory, events
from ftkit.train.step import means

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]


def run(settings: dict[str, Any], **options: bool) -> train.TrainResult:
    return train.run(RunConfig.from_toml(None, settings), **options)


def losses(settings: dict[str, Any]) -> list[float]:
    path = Path(settings["output.runs_dir"]) / settings["output.name"] / "events.jsonl"
    return [event["loss"] for event in events.read(path) if event["event"] == "step"]


def test_a_run_leaves_all_that_is_promised_and_learns(settings: Settings) -> None:
    heard = []
    chosen = settings(training__max_steps=30, evaluation__split=0.2, evaluation__every_steps=10)
    result = train.run(RunConfig.from_toml(None, chosen), heard.append)
    folder = Path(chosen["output.runs_dir"]) / "run"
    assert {path.name for path in folder.iterdir()} >= {
        "config.toml",
        "lock.json",
        "events.jsonl",
        "checkpoints",
        "adapter",
        "report.html",
        "result.json",
    }
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ftkit.json",
    }
    assert not [path for path in folder.rglob(".tmp-*")]
    heard = [event for event in heard if event["event"] != "reading"]  # none when the data was prepared before
    assert heard == events.read(folder / "events.jsonl")
    steps = [event for event in heard if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 31))
    evaluations = [event["loss"] for event in heard if event["event"] == "evaluation"]
    assert len(evaluations) == 4  # before the first step, and after 10, 20 and 30
    assert evaluations[-1] < evaluations[0] - 0.3
    assert result.eval_loss == min(evaluations)
    assert result.final_loss == steps[-1]["loss"]
    assert result.steps == 30
    assert result.tokens == sum(event["tokens"] for event in steps)
    assert 0 < result.trained_tokens < result.tokens
    assert result.peak_rss_bytes > result.peak_bytes > 100_000
    assert json.loads((folder / "result.json").read_text()) == result.table()
    assert RunConfig.from_toml(folder / "config.toml") == RunConfig.from_toml(None, chosen)
    assert "</html>" in (folder / "report.html").read_text()


def test_the_same_configuration_gives_the_same_bits_and_another_seed_does_not(settings: Settings) -> None:
    first = run(settings(output__name="first"))
    again = run(settings(output__name="again", evaluation__split=0.0, output__checkpoint_every_steps=5))
    other = run(settings(output__name="other", training__seed=1))
    assert first.adapter_sha256 == again.adapter_sha256
    assert losses(settings(output__name="first")) == losses(settings(output__name="again"))
    assert first.adapter_sha256 != other.adapter_sha256


def test_accumulated_batches_are_one_big_batch(settings: Settings) -> None:
    """The update after one step is the same to 1e-6, however its rows fall into forward passes."""
    one = {"method__dropout": 0.0, "training__max_steps": 1, "optimizer__learning_rate": 1.0, "optimizer__epsilon": 1.0}
    big = run(settings(**one, output__name="big", training__batch_rows=6))
    small = run(settings(**one, output__name="small", training__batch_rows=1, training__gradient_accumulation_steps=6))
    first = load_file(Path(big.adapter) / "adapter_model.safetensors")
    second = load_file(Path(small.adapter) / "adapter_model.safetensors")
    assert big.trained_tokens == small.trained_tokens
    assert max(float(weight.abs().max()) for weight in first.values()) > 1e-3
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{"training__activation_checkpointing": True}, {"model__dtype": "bfloat16"}])
def test_ways_to_save_memory_train_the_same(settings: Settings, changes: dict[str, Any]) -> None:
    plain = run(settings(output__name="plain"))
    saving = run(settings(output__name="saving", **changes))
    tolerance = 0.1 if "model__dtype" in changes else 1e-5
    assert losses(settings(output__name="saving")) == pytest.approx(
        losses(settings(output__name="plain")), abs=tolerance
    )
    assert saving.peak_bytes < plain.peak_bytes


def test_full_finetuning_goes_through_the_same_loop(settings: Settings) -> None:
    chosen = settings(method__name="full", optimizer__learning_rate=3e-3)
    del chosen["method.rank"], chosen["method.dropout"]
    run(chosen)
    found = losses(chosen)
    assert found[-1] < 0.9 * found[0]


def test_a_run_of_the_same_name_needs_a_word(settings: Settings) -> None:
    first = run(settings())
    with pytest.raises(InputError, match="expected no such run, got one that exists"):
        run(settings(training__seed=1))
    assert directory.every(settings()["output.runs_dir"])[0].finished() == first.table()
    second = run(settings(training__seed=1), overwrite=True)
    assert second.adapter_sha256 != first.adapter_sha256


def test_only_runs_are_overwritten(settings: Settings) -> None:
    folder = Path(settings()["output.runs_dir"]) / "run"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not ours to delete"):
        run(settings(), overwrite=True)
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "-x", "x" * 101])
def test_names_that_are_no_file_names_are_refused(settings: Settings, name: str) -> None:
    with pytest.raises(InputError, match=r"output\.name: expected up to 100 letters"):
        run(settings(output__name=name))


def test_bad_places_and_inputs_leave_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    for changes, message in (
        ({"output__runs_dir": str(tmp_path / "file" / "runs")}, "to be a directory to write to, got a file"),
        ({"model__source": str(tmp_path / "none.gguf")}, "none"),
        ({"data__path": str(tmp_path / "none.jsonl")}, "none"),
        ({"data__path": str(tmp_path / "empty.jsonl")}, "empty"),
        ({"output__loggers": ["tensorboard"]}, "expected the package 'tensorboard' to be installed"),
    ):
        with pytest.raises(InputError, match=message):
            run(settings(**changes))
    assert not (tmp_path / "runs" / "run").exists()


def test_patience_ends_a_run_and_the_best_weights_are_kept(settings: Settings) -> None:
    chosen = settings(
        training__max_steps=60, evaluation__split=0.3, evaluation__every_steps=2, evaluation__patience=2,
        optimizer__learning_rate=0.5, schedule__name="constant", schedule__warmup_share=0.3, output__keep_checkpoints=1,
    )  # fmt: skip
    result = run(chosen)
    found = directory.existing(chosen["output.runs_dir"], "run")
    evaluations = [event for event in events.read(found.events) if event["event"] == "evaluation"]
    best = min(evaluations[1:], key=lambda event: event["loss"])
    assert result.steps == best["step"] + 4 < 60
    kept = checkpoints.every(found.checkpoints)
    assert [checkpoints.step_of(path) for path in kept] == [best["step"], result.steps]
    assert (kept[0] / "adapter" / "adapter_model.safetensors").read_bytes() == (
        Path(result.adapter) / "adapter_model.safetensors"
    ).read_bytes()


def test_a_file_of_held_out_rows_is_evaluated_and_not_trained_on(settings: Settings, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    rows = Path(settings()["data.path"]).read_text().splitlines(keepends=True)
    held_out.write_text("".join(rows[:8]))
    told: list[dict[str, Any]] = []
    chosen = settings(evaluation__path=str(held_out), evaluation__every_steps=6, output__name="file")
    result = train.run(RunConfig.from_toml(None, chosen), told.append)
    assert [event["step"] for event in told if event["event"] == "evaluation"] == [0, 6, 12]
    assert result.adapter_sha256 == run(settings(output__name="none")).adapter_sha256
    lock = json.loads((Path(result.adapter).parent / "lock.json").read_text())
    assert lock["inputs"]["evaluation"] != lock["inputs"]["data"]


def test_the_evaluation_is_that_of_the_saved_adapter_without_dropout(settings: Settings) -> None:
    chosen = settings(method__dropout=0.5, evaluation__split=0.25, optimizer__learning_rate=0.03)
    result = run(chosen)
    loaded = models.load(chosen["model.source"])
    adapters.load(loaded.model, Path(result.adapter), 0)
    config = RunConfig.from_toml(None, chosen).data
    _, held_out = prepare(config, loaded.tokenizer, loaded.template, seed=0, split=0.25)
    assert held_out is not None
    loss = means(lambda batch: sft.loss(loaded.model, batch), list(held_out.batches(2, passes=1))).loss
    assert result.eval_loss == pytest.approx(loss, rel=1e-6)


def test_a_change_that_makes_another_run_is_refused_on_resuming(settings: Settings) -> None:
    run(settings(training__max_steps=4))
    with pytest.raises(InputError) as error:
        train.resumed_config(None, settings(training__max_steps=6, optimizer__learning_rate=1.0, training__seed=9))
    assert "optimizer.learning_rate: was 0.01, is 1.0; training.seed: was 0, is 9" in error.value.message
    allowed = train.resumed_config(None, settings(training__max_steps=6, output__checkpoint_every_steps=1))
    assert (allowed.training.max_steps, allowed.output.checkpoint_every_steps) == (6, 1)
    with pytest.raises(InputError, match="expected an unfinished run to resume, got none"):
        train.resumed_config(None, {"output.runs_dir": settings()["output.runs_dir"]})


def test_resuming_on_other_inputs_is_refused_and_on_other_surroundings_said(settings: Settings, tmp_path: Path) -> None:
    run(settings(training__max_steps=4))
    folder = Path(settings()["output.runs_dir"]) / "run"
    lock = json.loads((folder / "lock.json").read_text())
    lock["surroundings"]["torch"] = "1.0"
    (folder / "lock.json").write_text(json.dumps(lock))
    more = RunConfig.from_toml(None, settings(training__max_steps=6))
    heard: list[dict[str, Any]] = []
    train.run(more, heard.append, resume=True)
    assert any(event["event"] == "notice" and "torch: was 1.0" in event["message"] for event in heard)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(settings()["data.path"]).read_text().replace("Yes!", "No!"))
    with pytest.raises(InputError, match="expected what the run began with, got something else: data: was "):
        run(settings(data__path=str(other)), resume=True)


def test_a_run_that_was_killed_before_it_began_begins(settings: Settings) -> None:
    expected = run(settings(output__name="other"))
    run(settings())
    folder = Path(settings()["output.runs_dir"]) / "run"
    for path in folder.iterdir():
        if path.name != "config.toml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(settings(), resume=True).adapter_sha256 == expected.adapter_sha256


def test_a_place_that_fills_up_at_once_keeps_nothing(settings: Settings) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(settings(output__name="cached"))  # the data is prepared
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(InputError, match="expected room for this file"):
            run(settings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (Path(settings()["output.runs_dir"]) / "run").exists()


def test_a_rate_that_makes_weights_infinite_is_said_skipped_and_ends_the_run(settings: Settings) -> None:
    heard: list[dict[str, Any]] = []
    changes = {"optimizer__learning_rate": 1e36, "schedule__warmup_steps": 0, "training__stop_after_bad_steps": 3}
    with pytest.raises(
        FtkitError, match=r"stopped after 3 bad steps in a row: step 4: expected a finite loss, got nan"
    ):
        train.run(RunConfig.from_toml(None, settings(**changes)), heard.append)
    assert [event["kind"] for event in heard if event["event"] == "warning"] == ["loss_not_finite"] * 2
    assert heard[-1]["event"] == "failed"
    weights = load_file(
        max((Path(settings()["output.runs_dir"]) / "run/checkpoints").iterdir()) / "weights.safetensors"
    )
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_an_adapter_that_cannot_learn_is_said(settings: Settings) -> None:
    """So small a scale leaves gradients that float32 cannot tell from zero."""
    heard: list[dict[str, Any]] = []
    config = RunConfig.from_toml(None, settings(method__alpha=1e-45, training__stop_after_bad_steps=2))
    with pytest.raises(FtkitError, match="step 2: expected a gradient, got zero in every trained parameter"):
        train.run(config, heard.append)
    assert [event["kind"] for event in heard if event["event"] == "warning"] == ["gradient_zero"]


def test_a_gradient_that_overflows_is_said_though_the_loss_is_finite(settings: Settings) -> None:
    """A new adapter adds nothing to the loss whatever its scale, but its gradient is multiplied by it."""
    heard: list[dict[str, Any]] = []
    config = RunConfig.from_toml(None, settings(method__alpha=1e38, training__stop_after_bad_steps=2))
    with pytest.raises(FtkitError, match="step 2: expected a finite gradient, got a norm of inf"):
        train.run(config, heard.append)
    assert [event["kind"] for event in heard if event["event"] == "warning"] == ["gradient_not_finite"]


def test_a_batch_with_nothing_to_train_on_is_said(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data room keeps such rows out, so they are made by hand: every third batch loses its targets.

    The first one made is the rehearsal's.
    """
    made, original = [], Dataset.batch

    def batch(self: Dataset, rows: list[int]) -> RaggedBatch:
        made.append(rows)
        whole = original(self, rows)
        assert whole.targets is not None
        return (
            replace(whole, targets=torch.full_like(whole.targets, -100))
            if len(made) % 3 == 1 and len(made) > 1
            else whole
        )

    monkeypatch.setattr(Dataset, "batch", batch)
    heard: list[dict[str, Any]] = []
    result = train.run(RunConfig.from_toml(None, settings()), heard.append)
    warnings = [event for event in heard if event["event"] == "warning"]
    assert [(event["kind"], event["step"]) for event in warnings] == [("nothing_trained", s) for s in (3, 6, 9, 12)]
    assert [event["loss"] is None for event in heard if event["event"] == "step"] == [False, False, True] * 4
    assert result.bad_steps == 4


def test_a_learning_rate_that_is_too_low_is_reported(settings: Settings) -> None:
    heard: list[dict[str, Any]] = []
    config = RunConfig.from_toml(None, settings(training__max_steps=15, optimizer__learning_rate=1e-12))
    train.run(config, heard.append)
    assert [event["kind"] for event in heard if event["event"] == "warning"] == ["loss_never_moved"]


def test_a_broken_template_is_said(settings: Settings, tmp_path: Path) -> None:
    chosen = settings()
    model = tmp_path / "model"
    shutil.copytree(chosen["model.source"], model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(InputError, match="template"):
        run(chosen | {"model.source": str(model)})
    assert not (Path(chosen["output.runs_dir"]) / "run").exists()
