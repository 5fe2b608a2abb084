"""The real model converted to each scheme as it loads: near the dense one, kept on disk, trained over, told apart."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftkit import models
from ftkit.config import RunConfig
from ftkit.config.cache import cache_directory
from ftkit.engine import launch
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError
from ftkit.merge import merge
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.linear import DenseWeight
from ftkit.quant._scheme import QuantizedWeight
from ftkit.train import run

pytestmark = pytest.mark.model

TEXT = "The river rises in the mountains. It flows to the sea, and on its way it turns the mills."
# KL from the dense model in nats a token, measured × 1.5
BOUNDS = {"nf4": 0.4, "fp4": 0.85, "int4": 0.6, "int8": 0.008, "int8:32": 0.0025, "fp8_e4m3": 0.033, "int4_group": 0.45}


@pytest.fixture(scope="module")
def dense(smollm2: Path) -> LoadedModel:
    return models.load(smollm2)


def log_probabilities(loaded: LoadedModel) -> Tensor:
    batch = RaggedBatch.pack([loaded.tokenizer.encode(TEXT)])
    with torch.inference_mode():
        return loaded.model.head(loaded.model(batch)).double().log_softmax(-1)


@pytest.mark.parametrize("quant", BOUNDS)
def test_the_model_is_near_the_dense_one_and_smaller(quant: str, smollm2: Path, dense: LoadedModel) -> None:
    loaded, expected = models.load(smollm2, quant=quant), log_probabilities(dense)
    divergence = (expected.exp() * (expected - log_probabilities(loaded))).sum(-1).mean()
    assert 0 < divergence < BOUNDS[quant]
    linears = loaded.model.linears()
    held = [name for name, linear in linears.items() if isinstance(linear.weight, QuantizedWeight)]
    assert held == [name for name in linears if name != "lm_head"]
    assert loaded.model.lm_head.weight is loaded.model.embed_tokens.weight
    weights = [linears[name].weight for name in held]
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)
    assert bits < 9.01 if "8" in quant else bits < 4.51
    assert loaded.fingerprint == f"{dense.fingerprint}+{quant}"


def test_groups_of_32_find_the_numbers_of_the_file_again(smollm2: Path, dense: LoadedModel) -> None:
    """Q4_1's numbers are a scale, an offset and 4 bits, so converting finds them again."""
    loaded = models.load(smollm2, quant="int4_group:32")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.7.mlp.gate_proj"):
        theirs = dense.model.linears()[name].weight.dense()
        assert (loaded.model.linears()[name].weight.dense() - theirs).abs().max() <= 2e-3 * theirs.abs().max()


def test_what_was_converted_is_kept_and_damage_is_made_anew(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = models.load(smollm2, quant="nf4")
    (folder,) = cache_directory().glob("quantized/nf4-*")
    assert not list(folder.glob(".tmp-*"))
    broken = sorted(folder.iterdir())[7]
    content = broken.read_bytes()
    broken.unlink()  # the first model may have it mapped
    broken.write_bytes(content[:-9])
    seen: list[str] = []
    read = models._weights.Gguf.read

    def noted(self: models._weights.Gguf, name: str, dtype: torch.dtype) -> Tensor:
        seen.append(name)
        return read(self, name, dtype)

    monkeypatch.setattr(models._weights.Gguf, "read", noted)
    second = models.load(smollm2, quant="nf4")
    assert len([name for name in seen if name.startswith("blk.") and "norm" not in name]) == 1
    for name, linear in first.model.linears().items():
        if isinstance(linear.weight, QuantizedWeight):
            again = second.model.linears()[name].weight
            assert all(torch.equal(part, again.parts[part_name]) for part_name, part in linear.weight.parts.items())


def test_a_run_is_planned_brings_its_scheme_and_merges_to_what_it_answers(smollm2: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "Rain falls on the roof and the cat sleeps under the table."}\n' * 4)
    config = RunConfig.from_toml(
        None,
        {
            "model.source": str(smollm2),
            "model.quant": "nf4",
            "data.path": str(data),
            "data.train_on": "all",
            "data.max_tokens": 64,
            "training.max_steps": 2,
            "output.runs_dir": str(tmp_path / "runs"),
            "output.name": "small",
            "output.samples": 0,
        },
    )
    result = run(config)
    assert result.peak_bytes <= result.planned_peak_bytes <= 1.01 * result.peak_bytes
    place = models.resolve("small", tmp_path / "runs")
    assert place.quant == "nf4"
    assert models.load(place).fingerprint.endswith("+nf4")
    with pytest.raises(InputError, match="expected an adapter for this base model"):
        merge(str(smollm2), tmp_path / "wrong", folders=[tmp_path / "runs" / "small" / "adapter"])
    merged = merge("small", tmp_path / "merged", runs_dir=tmp_path / "runs", kind="f32")
    assert merged.parity.passed
    assert merged.parity.kl_mean < 1e-6


@pytest.mark.parametrize("wrong", ["nf5", "nf4:64", "int8:7", "int8:", "none:1", "gguf:q4_0", ":"])
def test_schemes_and_options_that_are_not_there_are_named(wrong: str) -> None:
    with pytest.raises(InputError, match="expected one of"):
        RunConfig.from_toml(None, {"model.source": "x", "data.path": "y", "model.quant": wrong})


@pytest.mark.parametrize("wrong", ["nf5", "nf4:64", "int8:7", "gguf:q4_0"])
def test_they_are_refused_by_loading_too(wrong: str, smollm2: Path) -> None:
    with pytest.raises(InputError, match="expected"):
        models.load(smollm2, quant=wrong)


def test_the_engine_answers_as_the_model(smollm2: Path) -> None:
    """The core's fused layers leave schemes to the layers in Python."""
    loaded = models.load(smollm2, quant="nf4")
    row = list(loaded.tokenizer.encode_prompt("The capital of France is"))
    start = len(row)
    with torch.inference_mode():
        for _ in range(5):
            batch = RaggedBatch.pack([row])
            row.append(int(loaded.model.head(loaded.model(batch))[-1].argmax()))
    with launch(smollm2, quant="nf4") as engine:
        answer = engine.generate("The capital of France is", Sampling(temperature=0, max_tokens=5))
    assert answer.tokens == row[start:]


def test_the_core_answers_from_the_parts_what_it_answers_from_the_dense_matrices(smollm2: Path) -> None:
    greedy = Sampling(temperature=0.0, max_tokens=8, ignore_end=True, logprobs=0)
    with launch(smollm2, quant="nf4", pool_bytes=64 << 20) as engine:
        model = engine.loaded.model
        found = engine.generate("The river rises in", greedy)
        fused = model.__dict__["_fused"].layers[None]
        assert fused is not None
        for linear in model.linears().values():
            linear.weight = DenseWeight(linear.weight.dense())
        expected = engine.generate("The river rises in", greedy)
        assert model.__dict__["_fused"].layers[None] is not fused
    assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)
