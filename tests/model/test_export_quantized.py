"""The real model written in 4 bits: transformers answers as we do, and the directory answers and is trained over."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM

from ftkit import models
from ftkit.config import RunConfig
from ftkit.engine import launch
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError
from ftkit.export import Exported, export
from ftkit.merge import merge
from ftkit.nn.batch import RaggedBatch
from ftkit.quant._scheme import QuantizedWeight
from ftkit.train import run

pytestmark = pytest.mark.model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def nf4(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(str(smollm2), tmp_path_factory.mktemp("nf4") / "model", to="safetensors", kind="f32", quant="nf4")


def test_transformers_has_our_matrices_and_logits(nf4: Exported) -> None:
    assert nf4.remarks[0].startswith("210 matrices were quantized to nf4 (210 of them had been quantized before)")
    assert nf4.parity.kl_mean < 0.75  # measured × 1.5
    ours, peer = models.load(nf4.out), AutoModelForCausalLM.from_pretrained(nf4.out).eval()
    count = 0
    for name, module in peer.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it would multiply in bfloat16
            weight = ours.model.linears()[name].weight
            theirs = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(theirs, weight.dense()), name
            count += 1
    assert count == 210
    ids = ours.tokenizer.encode_prompt(PROMPT)
    with torch.inference_mode():
        expected, got = ours.model.head(ours.model(RaggedBatch.pack([ids]))), peer(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)  # sums of float32 in two orders, at logits of 20
    row = list(ids)
    with torch.inference_mode():
        for _ in range(4):
            row.append(int(ours.model.head(ours.model(RaggedBatch.pack([row])))[-1].argmax()))
    with launch(nf4.out) as engine:
        held = [linear.weight for linear in engine.loaded.model.linears().values() if linear.name != "lm_head"]
        assert all(isinstance(weight, QuantizedWeight) for weight in held)
        answer = engine.generate(PROMPT, Sampling(temperature=0, max_tokens=4))
    assert answer.tokens == row[len(ids) :]


def test_a_run_over_the_directory_is_planned_and_merged(nf4: Exported, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "Rain falls on the roof and the cat sleeps under the table."}\n' * 4)
    config = RunConfig.from_toml(
        None,
        {
            "model.source": str(nf4.out),
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
    merged = merge("small", tmp_path / "merged", runs_dir=tmp_path / "runs", kind="f32")
    assert merged.parity.kl_mean < 1e-6


def test_float_offsets_become_whole_zero_points_only_when_asked(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected matrices without float offsets, got .* with them"):
        export(str(smollm2), tmp_path / "out", to="safetensors", quant="int4")
    made = export(str(smollm2), tmp_path / "out", to="safetensors", quant="int4", requantize=True)
    assert "weights moved by" in made.remarks[0]
    ours = models.load(made.out, dtype=torch.bfloat16)
    peer = AutoModelForCausalLM.from_pretrained(made.out)
    for name, linear in ours.model.linears().items():
        assert torch.equal(peer.get_submodule(name).weight, linear.weight.dense()), name
