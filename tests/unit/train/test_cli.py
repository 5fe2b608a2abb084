"""`ftkit train` on the command line: one JSON document with the promised keys, options that reach the configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ftkit import plugins
from ftkit.cli import application
from ftkit.config import RunConfig
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

KEYS = {
    "run",
    "adapter",
    "adapter_sha256",
    "steps",
    "final_loss",
    "eval_loss",
    "real_tokens_per_second",
    "peak_bytes",
    "planned_peak_bytes",
    "peak_rss_bytes",
    "planned_peak_rss_bytes",
}


def test_json_is_one_document_and_options_reach_the_configuration(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    base = settings()
    config = tmp_path / "run.toml"
    config.write_text(f'[model]\nsource = "{base["model.source"]}"\n[training]\nmax_steps = 50\nseed = 4\n')
    words = [
        "train", str(config), "--data", base["data.path"], "--max-steps", "3", "--name", "named", "--method", "lora",
        "--runs-dir", str(tmp_path / "here"), "--learning-rate", "0.01", "--set", "method.rank=2", "--max-tokens", "64",
        "--evaluation-split", "0.25", "--set", "output.samples=0", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(application(), words, catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document.keys() >= KEYS
    assert (document["run"], document["steps"]) == ("named", 3)
    assert Path(document["adapter"]) == tmp_path / "here" / "named" / "adapter"
    assert "step 3/3 · loss" in result.stderr
    assert "tokens/s" in result.stderr
    stored = RunConfig.from_toml(tmp_path / "here" / "named" / "config.toml")
    assert (stored.training.seed, stored.training.max_steps, stored.data.max_tokens) == (4, 3, 64)
    assert (stored.method.options["rank"], stored.optimizer.options["learning_rate"]) == (2, 0.01)


@pytest.mark.parametrize("optimizer", plugins.names("optim"))
def test_every_optimizer_can_be_planned_and_trained(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, optimizer: str
) -> None:
    base = settings()
    words = [
        "--model", base["model.source"], "--data", base["data.path"], "--max-steps", "2", "--max-tokens", "64",
        "--set", f"optimizer.name={optimizer}", "--set", "method.rank=2", "--set", "output.samples=0", "--json",
    ]  # fmt: skip
    plan = CliRunner().invoke(application(), ["plan", *words], catch_exceptions=False)
    assert json.loads(plan.stdout)["by_category"]["optimizer"] > 0
    there = ["--name", optimizer, "--runs-dir", str(tmp_path)]
    result = CliRunner().invoke(application(), ["train", *words, *there], catch_exceptions=False)
    document = json.loads(result.stdout)
    assert (result.exit_code, document["steps"]) == (0, 2)
    assert document["peak_bytes"] <= document["planned_peak_bytes"]
    assert RunConfig.from_toml(tmp_path / optimizer / "config.toml").optimizer.name == optimizer


def test_what_is_wrong_with_a_configuration_comes_at_once(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[model]\nsorce = "x"\n[data]\npath = "y"\nmax_tokens = "many"\n')
    with pytest.raises(InputError) as error:
        CliRunner().invoke(application(), ["train", str(config)], catch_exceptions=False)
    assert "line 2: model.sorce: unknown key, did you mean 'source'?" in error.value.message
    assert (
        "line 5: data.max_tokens: expected an integer, at least 8 and at most 10000000, got 'many'"
        in error.value.message
    )
