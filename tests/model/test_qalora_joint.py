"""QA-LoRA's joint variant on the real model: what is trained in 3 bits is what the written file answers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from llama_agreement import with_llama_cpp
from torch import Tensor

from ftkit import adapters, merge, models
from ftkit.config import RunConfig
from ftkit.engine import launch
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError
from ftkit.export import export
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.train import run

pytestmark = pytest.mark.model

PROMPTS = ["The capital of France is", "def mean(values):", "Once upon a time", "The keeper of the lighthouse is"]
JOINT = {"variant": "joint", "bits": 3, "target_modules": ["k_proj", "down_proj"]}


@pytest.fixture(scope="module")
def live(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """The dense model with an adapter of such numbers as training gives, and the adapter on disk."""
    loaded = models.load(smollm2)
    adapters.attach(loaded.model, "qalora", JOINT, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapters.trainable(loaded.model).items():
            size = 0.3 if name.endswith("lora_B") else 0.01
            parameter += size * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapters.save(loaded.model, 0, folder)
    return loaded, folder


@pytest.fixture(scope="module")
def written(smollm2: Path, live: tuple[LoadedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "merged.gguf"
    result = merge.merge(str(smollm2), out, folders=[live[1]])
    assert (result.parity.kl_max, result.parity.top1, result.parity.greedy_match, result.remarks) == (0, 1, 1, ())
    return out


def logits(loaded: LoadedModel, adapter: int) -> Tensor:
    batch = RaggedBatch.pack([loaded.tokenizer.encode(text) for text in PROMPTS], adapter=adapter)
    return loaded.model.head(loaded.model(batch), batch.routes).detach()


def test_others_read_the_numbers_that_were_trained(
    smollm2: Path, live: tuple[LoadedModel, Path], written: Path
) -> None:
    """Blocks of Q4_1 with codes of three bits, which the `gguf` package dequantizes to the adapter's, to the bit."""
    loaded = live[0]
    merged = adapters.merged(loaded.model, 0)
    family = models.family(loaded.config.family)
    names = {family.gguf_name(name): name for name in merged}
    assert written.stat().st_size == smollm2.stat().st_size
    rounded = 0
    for tensor in gguf.GGUFReader(written).tensors:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = family.to_gguf(loaded.config, names[tensor.name], merged[names[tensor.name]])
        assert np.array_equal(ours.contiguous().numpy().view(np.uint32), theirs.reshape(ours.shape).view(np.uint32))
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            codes = tensor.data.reshape(-1, 20)[:, 4:]
            highest = {int((codes & 15).max()), int((codes >> 4).max())}
            assert highest == ({7} if "attn_k" in tensor.name or "ffn_down" in tensor.name else {15})
            rounded += highest == {7}
    assert rounded == 60


def test_the_file_answers_as_the_adapter_in_training_and_in_serving(
    smollm2: Path, live: tuple[LoadedModel, Path], written: Path
) -> None:
    loaded, adapter = live
    with torch.no_grad():
        expected, base = logits(loaded, 0), logits(loaded, -1)
        assert torch.equal(logits(models.load(written, quant="gguf"), -1), expected)
    trained = logits(loaded, 0)  # with gradients, as a training step computes it
    assert torch.equal(logits(models.load(written), -1), trained)
    assert (trained - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (base - expected).abs().max() > 0.3
    greedy = Sampling(temperature=0, max_tokens=12)
    with launch(smollm2, {"tuned": adapter}) as engine, launch(written) as other:
        unmerged = engine.generate_many(PROMPTS, greedy, model="tuned")
        assert [a.tokens for a in unmerged] == [a.tokens for a in other.generate_many(PROMPTS, greedy)]
        assert [a.tokens for a in engine.generate_many(PROMPTS, greedy)] != [a.tokens for a in unmerged]


@pytest.mark.llama
def test_llama_cpp_reads_the_file_as_we_do(written: Path) -> None:
    pytest.importorskip("llama_cpp")
    assert with_llama_cpp(written) > 0.93


def test_a_run_learns_from_the_dense_model_within_its_plan(smollm2: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = ["The keeper of the lighthouse is an old man who lives alone.", "Once upon a time there was a small town."]
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    settings = {
        "model.source": str(smollm2),
        "method.name": "qalora",
        "method.variant": "joint",
        "method.bits": 3,
        "method.group": 64,
        "method.target_modules": ["down_proj"],
        "objective.name": "distill",
        "data.path": str(data),
        "data.max_tokens": 32,
        "optimizer.learning_rate": 2e-3,
        "schedule.name": "constant",
        "training.max_steps": 6,
        "output.runs_dir": str(tmp_path / "runs"),
        "output.name": "small",
        "output.samples": 0,
    }
    config = RunConfig.from_toml(None, settings)
    assert config.model.quant == "none"
    result = run(config)
    events = (json.loads(line) for line in (tmp_path / "runs/small/events.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in events if "loss" in event]
    assert losses[-1] < 0.8 * losses[0]
    assert result.peak_bytes <= result.planned_peak_bytes <= 1.01 * result.peak_bytes
    table = json.loads((tmp_path / "runs/small/adapter/adapter_config.json").read_text())
    assert [table[key] for key in ("peft_type", "variant", "bits", "group_size")] == ["QALORA", "joint", 3, 64]
    merged = export("small", tmp_path / "out.gguf", to="gguf", runs_dir=tmp_path / "runs")
    assert (merged.parity.kl_max, merged.bytes) == (0, smollm2.stat().st_size)


def test_what_does_not_fit_is_refused_or_told(smollm2: Path) -> None:
    loaded = models.load(smollm2)
    attach = adapters.attach
    for options, message in (
        ({"bits": 3}, "expected them with variant 'joint'"),
        ({**JOINT, "group": 48}, "expected a multiple of 32"),
        ({**JOINT, "bits": 5}, "expected one of 2, 3, 4"),
        ({**JOINT, "group": 128, "target_modules": ["q_proj"]}, r"rows of whole groups of 128, got 30 without"),
    ):
        with pytest.raises(InputError, match=message):
            attach(loaded.model, "qalora", options, seed=0)
    attach(loaded.model, "qalora", {"variant": "joint", "bits": 3, "group": 128}, seed=0)
    first, second = adapters.notices(loaded.model)
    assert first == "qalora: 30 layers start rounded to nearest, to 3 bits in groups of 128"
    assert second.startswith(
        "qalora: 180 layers have no rows of whole groups of 128 and are not adapted: model.layers.0"
    )
