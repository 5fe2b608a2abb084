"""A GGUF model on its own blocks computes, to the bit, what it computes dequantized; the blocks stay in their file."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ftkit import adapters, models
from ftkit.config import RunConfig
from ftkit.engine import Engine, Sampling, launch
from ftkit.errors import InputError
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.objectives import sft
from ftkit.quant._packed import PackedWeight, round_activations
from ftkit.quant.gguf import GgufWeight
from ftkit.train import run

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def dense(smollm2: Path) -> LoadedModel:
    return models.load(smollm2)


@pytest.fixture
def quantized(smollm2: Path) -> LoadedModel:
    return models.load(smollm2, quant="gguf")


def test_it_answers_as_the_dense_model_to_the_bit(dense: LoadedModel, quantized: LoadedModel) -> None:
    rows = [dense.tokenizer.encode("The river rises in the mountains."), dense.tokenizer.encode("def mean(values):")]
    batch = RaggedBatch.pack(rows)
    with torch.no_grad():
        theirs, ours = (loaded.model.head(loaded.model(batch)) for loaded in (dense, quantized))
    assert torch.equal(ours, theirs)
    assert quantized.fingerprint == dense.fingerprint


def test_blocks_are_the_file_s_and_only_reordered_ones_are_copied(smollm2: Path, quantized: LoadedModel) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
    copied = [name for name, _ in quantized.model.named_buffers() if name.endswith("blocks")]
    assert len(copied) == 2 * quantized.config.layers
    assert all(".q_proj." in name or ".k_proj." in name for name in copied)
    layer = quantized.model.linears()["model.layers.7.mlp.down_proj"].weight
    assert isinstance(layer, GgufWeight)
    theirs = tensors["blk.7.ffn_down.weight"]
    assert np.array_equal(layer.blocks.numpy(), theirs.data)
    ours = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    assert np.array_equal(layer.dense().numpy().view(np.uint32), ours.view(np.uint32))
    assert quantized.model.lm_head.weight is quantized.model.embed_tokens.weight


def test_a_step_over_blocks_is_the_step_over_dense_weights(dense: LoadedModel, quantized: LoadedModel) -> None:
    rows = [dense.tokenizer.encode("One two three, one two three."), [5, 9, 2, 7]]
    batch = RaggedBatch.pack(rows, targets=[[*row[1:], -100] for row in rows], adapter=0)
    gradients = []
    for loaded in (dense, quantized):
        adapters.attach(loaded.model, "lora", {"rank": 4}, seed=1)
        sft.loss(loaded.model, batch).sum.sum().backward()
        found = adapters.trainable(loaded.model)
        gradients.append({name: parameter.grad for name, parameter in found.items()})
        adapters.detach(loaded.model, 0)
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_run_takes_less_than_planned_and_than_the_dense_run(smollm2: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "Rain falls on the roof and the cat sleeps under the table."}\n' * 4)
    results = {}
    for quant in ("none", "gguf"):
        config = RunConfig.from_toml(
            None,
            {
                "model.source": str(smollm2),
                "model.quant": quant,
                "data.path": str(data),
                "data.train_on": "all",
                "data.max_tokens": 64,
                "training.max_steps": 2,
                "output.runs_dir": str(tmp_path / "runs"),
                "output.name": quant,
                "output.samples": 0,
            },
        )
        results[quant] = run(config)
    ours, theirs = results["gguf"], results["none"]
    assert ours.final_loss == theirs.final_loss
    assert ours.adapter_sha256 == theirs.adapter_sha256
    assert ours.peak_bytes <= ours.planned_peak_bytes <= 1.01 * ours.peak_bytes
    # the head's matrix is the largest that is dense for a moment: a fifth of the model
    assert ours.peak_bytes < 0.55 * theirs.peak_bytes


def test_values_that_are_not_finite_and_other_files_are_refused(smollm2: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(smollm2)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.3.ffn_up.weight")
    content = bytearray(smollm2.read_bytes())
    content[int(tensor.data_offset) : int(tensor.data_offset) + 2] = b"\x00\x7e"  # the first block's scale: NaN
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=r"blk\.3\.ffn_up\.weight.*finite"):
        models.load(damaged, quant="gguf")
    with pytest.raises(InputError, match="expected one of"):
        RunConfig.from_toml(None, {"model.source": "x", "data.path": "y", "model.quant": "ggufs"})


def test_rounded_activations_hardly_move_the_answers_and_a_row_is_the_same_in_any_batch(
    dense: LoadedModel, smollm2: Path
) -> None:
    text = (
        "The river rises in the mountains, flows through three towns and ends in a lake. "
        "Its water is cold in spring, and in autumn it carries leaves. " * 3
    )
    tokens = dense.tokenizer.encode(text)
    loaded = models.load(smollm2, quant="gguf")
    round_activations(loaded.model)
    assert all(isinstance(linear.weight, PackedWeight) for linear in loaded.model.linears().values())
    assert isinstance(loaded.model.embed_tokens.weight, GgufWeight)
    batch = RaggedBatch.pack([tokens])
    with torch.no_grad():
        exact, rounded = (model.model.head(model.model(batch)).double().log_softmax(-1) for model in (dense, loaded))
    kl = (exact.exp() * (exact - rounded)).sum(-1)
    assert 0 < kl.mean() < 0.005
    assert (exact.argmax(-1) == rounded.argmax(-1)).double().mean() > 0.95
    with Engine(loaded, pool_bytes=64 << 20) as engine:
        prompts = [tokens[:n] for n in (3, 40, 17, 60)]
        greedy = Sampling(temperature=0.0, max_tokens=12, ignore_end=True, logprobs=0)
        together = engine.generate_many(prompts, greedy)
        for prompt, answer in zip(prompts, together, strict=True):
            alone = engine.generate(prompt, greedy)
            assert alone.tokens == answer.tokens
            assert alone.logprobs == answer.logprobs


def test_activations_are_rounded_only_where_weights_are_whole_numbers(smollm2: Path) -> None:
    with pytest.raises(InputError, match="--fast-decode: expected matrices in blocks of whole numbers, got none"):
        launch(smollm2, quant="none", fast_decode=True)
