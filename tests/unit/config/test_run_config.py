"""The configuration of a run: files, overrides and plugins' options, checked as a whole."""

from pathlib import Path

import pytest

from ftkit import plugins
from ftkit.config import Choice, DataConfig, EvaluationConfig, ModelConfig, RunConfig
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

GOOD = """
[model]
source = "model.gguf"

[data]
path = ["a.jsonl", "b.jsonl"]

[method]
rank = 4

[schedule]
name = "wsd"
decay_share = 0.5
"""


def test_a_configuration_written_out_reads_back_equal_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(GOOD)
    config = RunConfig.from_toml(path, ["training.max_steps=7", "schedule.warmup_steps=3", "output.name=first"])
    assert config.data.path == ("a.jsonl", "b.jsonl")
    assert (config.method.name, config.method.options["rank"]) == ("lora", 4)
    assert config.schedule.options == {"decay_share": 0.5, "end": 0.0, "warmup_share": 0.03, "warmup_steps": 3}
    assert config.optimizer.options["learning_rate"] == 2e-4
    path.write_text(config.to_toml())
    assert RunConfig.from_toml(path) == config
    assert config.resolved() == config


def test_a_configuration_made_in_python_is_completed_and_checked() -> None:
    config = RunConfig(model=ModelConfig(source="m"), data=DataConfig(path="d"), method=Choice(name="lora", options={}))
    assert config.resolved().method.options["rank"] > 0
    wrong = RunConfig(model=ModelConfig(source="m"), data=DataConfig(path="d", max_tokens=0))
    with pytest.raises(
        InputError, match=r"data\.max_tokens: expected an integer, at least 8 and at most 10000000, got 0"
    ):
        wrong.resolved()


def test_all_problems_come_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        GOOD.replace("rank = 4", "rnk = 4").replace('"wsd"', '"wds"') + "[trainig]\n[training]\nepochs = -1\n"
    )
    with pytest.raises(InputError) as error:
        RunConfig.from_toml(path, {"evaluation.split": 2, "model.sauce": "x"})
    assert str(error.value).splitlines() == [
        f"{path}: expected a valid configuration, got 6 problems",
        "  line 9: method.rnk: unknown key, did you mean 'rank'?",
        "  line 12: schedule.name: expected one of 'constant', 'cosine', 'linear', 'wsd', got 'wds'"
        ", did you mean 'wsd'?",
        "  line 14: trainig: unknown section, did you mean 'training'?",
        "  line 16: training.epochs: expected a number, above 0, got -1",
        "  model.sauce: unknown key, did you mean 'source'?",
        "  evaluation.split: expected a number, at least 0 and below 1, got 2",
    ]


def test_what_contradicts_itself_is_an_error() -> None:
    with pytest.raises(InputError, match="expected a path or a split, got both"):
        EvaluationConfig(path="held_out.jsonl", split=0.1)
    overrides = {"model.source": "m", "data.path": "d", "evaluation.patience": 2}
    with pytest.raises(
        InputError, match=r"evaluation: patience: expected a path or a split to evaluate on, got neither"
    ):
        RunConfig.from_toml(None, overrides)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError) as error:
        RunConfig.from_toml(None)
    assert "model.source: expected text, got nothing" in error.value.message
    assert "data.path: expected text or a list" in error.value.message


def test_a_method_by_name_keeps_the_files_options(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(GOOD)
    assert RunConfig.from_toml(path, ["method=lora"]).method.options["rank"] == 4
    path.write_text(GOOD.replace("[method]\nrank = 4", ""))
    assert RunConfig.from_toml(path, ["method=lora", "method.rank=5"]).method.options["rank"] == 5


@pytest.mark.parametrize(
    ("section", "room"),
    [("method", "adapters"), ("objective", "objectives"), ("optimizer", "optim"), ("schedule", "optim.schedules")],
)
def test_every_plugin_can_be_chosen_and_refuses_options_it_does_not_have(section: str, room: str) -> None:
    base = {"model.source": "m", "data.path": "d"}
    for name in plugins.names(room):
        choice: Choice = getattr(RunConfig.from_toml(None, base | {f"{section}.name": name}), section)
        assert choice.name == name
        with pytest.raises(InputError, match=f"{section}.no_such_option: unknown key"):
            RunConfig.from_toml(None, base | {f"{section}.name": name, f"{section}.no_such_option": 1})
