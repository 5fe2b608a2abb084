"""`ftkit plan` for machines and models that are not here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ftkit.cli import application
from ftkit.config import RunConfig
from ftkit.errors import GateError, InputError
from ftkit.train import planned
from ftkit.train.verified import verify
from tiny_models import GROUPED, peer

pytestmark = pytest.mark.unit

LAYERS = 3
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
MATRICES = LAYERS * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
WEIGHTS = MATRICES + 2 * 1000 * 256 + (2 * LAYERS + 1) * 256
SLACK = 4 << 10
"""Bytes of tables, such as the rotary frequencies."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config.json without a model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def plan(*words: str) -> dict[str, Any]:
    found = CliRunner().invoke(application(), ["plan", *words, "--max-tokens", "64", "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    table: dict[str, Any] = json.loads(found.stdout)
    return table


def test_a_configuration_is_enough(config: Path) -> None:
    table = plan("--model-config", str(config))
    assert 0 <= table["by_category"]["base weights"] - 4 * WEIGHTS <= SLACK
    assert table["fits"]
    assert table["seconds_per_step"] > 0
    assert table["reserved_bytes"] is None


def test_a_gpu_that_is_not_here(config: Path) -> None:
    table = plan("--model-config", str(config), "--device", "cuda:8GiB", "--set", "model.dtype=bfloat16")
    assert 0 <= table["by_category"]["base weights"] - 2 * WEIGHTS <= SLACK
    assert table["peak_bytes"] <= table["reserved_bytes"] <= 1.3 * table["peak_bytes"] + (22 << 20)
    assert table["budget_bytes"] == 8 << 30
    assert table["peak_rss_bytes"] is table["seconds_per_step"] is None


def test_what_does_not_fit_is_said_and_by_how_much(config: Path) -> None:
    table = plan("--model-config", str(config), "--device", "cuda:620MiB", "--method", "full")
    assert not table["fits"]
    assert table["reserved_bytes"] > 16 * WEIGHTS  # weights, gradients and two states


def test_expandable_segments_are_as_the_environment_sets_them(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--model-config", str(config), "--device", "cuda:8GiB", "--method", "full")
    fixed = plan(*words)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    grown = plan(*words)
    assert grown["peak_bytes"] == fixed["peak_bytes"] <= grown["reserved_bytes"]
    pages = (20 << 20, 2 << 20)  # of the large and of the small pool
    assert any((grown["reserved_bytes"] - small * pages[1]) % pages[0] == 0 for small in range(1, 10))


def test_a_quantized_base_takes_its_bits(config: Path) -> None:
    table = plan("--model-config", str(config), "--quant", "nf4")
    dense = 4 * (WEIGHTS - MATRICES)
    assert table["by_category"]["base weights"] - dense == pytest.approx(MATRICES * 4.127 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda"], "expected cpu, or a GPU with its memory"),
        (["--device", "tpu:8GiB"], "expected cpu, or a GPU with its memory"),
        (["--device", "cuda:many"], "expected a size such as 8GiB"),
        (["--quant", "gguf"], "expected a scheme that matrices are converted to"),
    ],
)
def test_bad_words(config: Path, words: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said):
        CliRunner().invoke(application(), ["plan", "--model-config", str(config), *words], catch_exceptions=False)


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Exception, match=r"config\.json"):
        CliRunner().invoke(
            application(), ["plan", "--model-config", str(tmp_path / "config.json")], catch_exceptions=False
        )


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Words of a plan for a model that is here."""
    peer("llama", torch.float32, sizes=GROUPED).save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--data", "-", "--max-tokens", "64"]


@pytest.mark.parametrize(
    "changes",
    [
        {"method.name": "full", "training.batch_rows": 2},
        {"model.quant": "int8", "training.gradient_accumulation_steps": 2},
        {"training.offload": "activations", "data.max_tokens": 256},
        {"method.name": "full", "training.optimizer_in_backward": True, "training.max_gradient_norm": 0.0},
    ],
    ids=str,
)
def test_a_plan_is_held_against_real_steps(small: list[str], changes: dict[str, Any]) -> None:
    given = {"model.source": small[1], "data.path": "-", "data.max_tokens": 64}
    _, (tensors, process, step) = verify(RunConfig.from_toml(None, given | changes))
    assert 0.99 <= tensors.measured / tensors.planned <= 1
    assert process.bound
    assert process.measured > 2 * tensors.measured
    assert (step.unit, step.bound, step.holds) == ("seconds", False, True)


def test_a_process_of_its_own_keeps_to_the_plan(small: list[str]) -> None:
    words = [sys.executable, "-m", "ftkit", "plan", *small, "--verify", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [check["measured"] <= check["planned"] for check in json.loads(done.stdout)["checks"][:2]] == [True, True]


def test_a_plan_that_was_too_low_is_a_closed_gate(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "LATER_BYTES", -(1 << 30))
    with pytest.raises(GateError, match="expected no more than planned, got more: the process"):
        CliRunner().invoke(application(), ["plan", *small, "--verify"], catch_exceptions=False)


def test_a_machine_that_is_not_here_cannot_be_measured(config: Path) -> None:
    with pytest.raises(InputError, match="expected a model and a machine that are here"):
        CliRunner().invoke(application(), ["plan", "--model-config", str(config), "--verify"], catch_exceptions=False)
