"""QA-LoRA on the real model: what is trained over 4-bit blocks is what the written file of 4-bit blocks answers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from llama_agreement import with_llama_cpp
from safetensors.torch import save_file
from torch import Tensor

from ftkit import adapters, merge, models
from ftkit.config import RunConfig
from ftkit.engine import launch
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError
from ftkit.export import Material, export
from ftkit.export import gguf as gguf_target
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.recipes.quickstart import DATA
from ftkit.train import run

pytestmark = pytest.mark.model

PROMPTS = ["The capital of France is", "def mean(values):", "Once upon a time", "The keeper of the lighthouse is"]


def adapter_over(loaded: LoadedModel, folder: Path, **options: object) -> Path:
    """An adapter with random numbers of the size that training gives."""
    adapters.attach(loaded.model, "qalora", options, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model).values():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    adapters.save(loaded.model, 0, folder)
    return folder


@pytest.fixture(scope="module")
def live(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """The model over its file's blocks with an adapter, and the adapter on disk."""
    loaded = models.load(smollm2, quant="gguf")
    return loaded, adapter_over(loaded, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def written(smollm2: Path, live: tuple[LoadedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "merged.gguf"
    result = merge.merge(str(smollm2), out, folders=[live[1]])
    assert (result.parity.kl_max, result.parity.top1, result.parity.greedy_match, result.remarks) == (0, 1, 1, ())
    return out


def logits(loaded: LoadedModel, adapter: int) -> Tensor:
    batch = RaggedBatch.pack([loaded.tokenizer.encode(text) for text in PROMPTS], adapter=adapter)
    return loaded.model.head(loaded.model(batch), batch.routes).detach()


def test_the_file_has_its_size_its_codes_and_its_scales(smollm2: Path, written: Path) -> None:
    assert written.stat().st_size == smollm2.stat().st_size
    before, after = gguf.GGUFReader(smollm2), gguf.GGUFReader(written)
    assert [field for field in after.fields if not field.startswith("GGUF.")] == [
        field for field in before.fields if not field.startswith("GGUF.")
    ]
    theirs = {tensor.name: tensor for tensor in before.tensors}
    moved = 0
    for tensor in after.tensors:
        old = theirs[tensor.name]
        assert tensor.tensor_type == old.tensor_type
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            new, same = (data.reshape(-1, 20) for data in (tensor.data, old.data))
            assert np.array_equal(new[:, :2], same[:, :2])
            assert np.array_equal(new[:, 4:], same[:, 4:])
            moved += int((new[:, 2:4] != same[:, 2:4]).any(1).sum())
        else:
            assert np.array_equal(tensor.data, old.data)
    assert moved > 3_000_000, "nearly all of 3,317,760 offsets"


def test_others_read_the_numbers_that_were_trained(live: tuple[LoadedModel, Path], written: Path) -> None:
    """The `gguf` package dequantizes the file to what the adapter makes of the weights, to the bit."""
    loaded = live[0]
    merged = adapters.merged(loaded.model, 0)
    family = models.family(loaded.config.family)
    names = {family.gguf_name(name): name for name in merged}
    for tensor in gguf.GGUFReader(written).tensors:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = family.to_gguf(loaded.config, names[tensor.name], merged[names[tensor.name]])
        assert np.array_equal(ours.contiguous().numpy().view(np.uint32), theirs.reshape(ours.shape).view(np.uint32))


def test_the_file_answers_as_the_adapter_to_the_bit(
    smollm2: Path, live: tuple[LoadedModel, Path], written: Path
) -> None:
    loaded, adapter = live
    merged, dense = models.load(written, quant="gguf"), models.load(written)
    with torch.no_grad():
        expected = logits(loaded, 0)
        assert torch.equal(logits(merged, -1), expected)
        assert torch.equal(logits(dense, -1), expected)
        assert (logits(loaded, -1) - expected).abs().max() > 0.3, "the adapter does something"
    trained = logits(loaded, 0)  # with gradients, as a training step computes it
    assert torch.equal(logits(dense, -1), trained)
    assert (trained - expected).abs().max() <= 1e-5 * expected.abs().max()
    greedy = Sampling(temperature=0, max_tokens=24)
    with launch(smollm2, {"tuned": adapter}) as engine, launch(written) as other:
        unmerged = engine.generate_many(PROMPTS, greedy, model="tuned")
        assert [a.tokens for a in unmerged] == [a.tokens for a in other.generate_many(PROMPTS, greedy)]
        base = engine.generate_many(PROMPTS, greedy)
        assert [a.tokens for a in base] != [a.tokens for a in unmerged]


def test_groups_of_integers_become_a_file_that_answers_the_same(smollm2: Path, tmp_path: Path) -> None:
    loaded = models.load(smollm2, quant="int4_group")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(f'[model]\nsource = "{smollm2}"\nquant = "int4_group"\n')
    adapter_over(loaded, run / "adapter", target_modules=["q_proj", "k_proj", "mlp.down_proj"])
    result = export(str(run), tmp_path / "out.gguf", to="gguf")
    assert result.parity.kl_max < 1e-9
    assert result.parity.greedy_match == 1
    types = {str(tensor.tensor_type.name) for tensor in gguf.GGUFReader(result.out).tensors}
    assert types == {"Q4_1", "Q8_0", "F32"}
    written = models.load(result.out)
    merged = adapters.merged(loaded.model, 0)
    assert all(torch.equal(written.model.tensors()[name], tensor) for name, tensor in merged.items())
    assert torch.equal(logits(written, -1), logits(loaded, 0))


def test_a_run_learns_what_its_file_answers(smollm2: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = ["The keeper of the lighthouse is Odalys Brandt.", "The only lake on the island is called Lake Ferren."]
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    settings = {
        "model.source": str(smollm2),
        "method.name": "qalora",
        "method.rank": 8,
        "data.path": str(data),
        "data.train_on": "all",
        "data.max_tokens": 32,
        "optimizer.learning_rate": 3e-3,
        "training.max_steps": 12,
        "output.runs_dir": str(tmp_path / "runs"),
        "output.name": "small",
        "output.samples": 0,
    }
    config = RunConfig.from_toml(None, settings)
    assert config.model.quant == "gguf"
    result = run(config)
    assert result.final_loss is not None
    assert result.final_loss < 0.5
    assert result.peak_bytes <= result.planned_peak_bytes <= 1.01 * result.peak_bytes
    table = json.loads((tmp_path / "runs/small/adapter/adapter_config.json").read_text())
    assert (table["peft_type"], table["pooling"], table["group_size"]) == ("QALORA", "sum", 32)
    merged = export("small", tmp_path / "out.gguf", to="gguf", runs_dir=tmp_path / "runs")
    assert (merged.parity.kl_max, merged.bytes) == (0, smollm2.stat().st_size)
    greedy = Sampling(temperature=0, max_tokens=9)
    with launch("small", runs_dir=tmp_path / "runs") as engine, launch(merged.out) as other:
        answer = engine.generate(PROMPTS[3], greedy, model="small")
        assert answer.text == " Odalys Brandt." or answer.text.startswith(" Odalys Brandt")
        assert other.generate(PROMPTS[3], greedy).tokens == answer.tokens


def test_what_cannot_hold_it_is_refused_and_what_rounds_says_so(
    smollm2: Path, live: tuple[LoadedModel, Path], tmp_path: Path
) -> None:
    adapter = live[1]
    with pytest.raises(InputError, match=r"expected weights with a float offset .*, got 210 without"):
        adapters.attach(models.load(smollm2).model, "qalora", {}, seed=0)
    with pytest.raises(InputError, match="expected a method that PEFT has, got 'qalora'"):
        export(str(smollm2), tmp_path / "out", to="peft", adapter=adapter)
    with pytest.raises(InputError, match="float offset"):  # two of them have no sum in these codes
        merge.merge(str(smollm2), tmp_path / "out", folders=[adapter, adapter])
    assert not list(tmp_path.iterdir())
    remarks = gguf_target.write(Material.of(live[0], 0), tmp_path / "out.gguf", "f16")
    assert remarks == ["210 weights were rounded again, to f16; --type source keeps the blocks they are in"]


def test_layers_without_offsets_are_left_out_and_told_or_refused(smollm2: Path) -> None:
    loaded = models.load(smollm2, quant="gguf")
    odd = loaded.model.linears()["model.layers.7.mlp.up_proj"]
    odd.weight = models.load(smollm2).model.linears()[odd.name].weight
    adapters.attach(loaded.model, "qalora", {}, seed=0)
    assert odd.adapter(0) is None
    assert len(adapters.trainable(loaded.model)) == 2 * 209
    (notice,) = adapters.notices(loaded.model)
    assert notice == f"qalora: 1 layers have no float offsets and are not adapted: {odd.name}"
    with pytest.raises(InputError, match=f"got 1 without, such as {odd.name}"):
        adapters.attach(loaded.model, "qalora", {"target_modules": ["up_proj"]}, seed=0, adapter_id=1)
    assert 1 not in loaded.model.attached


def test_adapters_of_another_pooling_and_numbers_too_large_are_refused(
    live: tuple[LoadedModel, Path], tmp_path: Path
) -> None:
    loaded, folder = live
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = tmp_path / "other"
    other.mkdir()
    for name, content in files.items():
        (other / name).write_bytes(content)
    table = json.loads(files["adapter_config.json"])
    (other / "adapter_config.json").write_text(json.dumps(table | {"pooling": "mean"}))
    with pytest.raises(InputError, match="pooling: expected 'sum', got 'mean'"):
        adapters.load(loaded.model, other, 1)
    (other / "adapter_config.json").write_text(json.dumps(table))
    parameters = {
        f"base_model.model.{name}.weight": parameter.detach() * 1e4
        for name, parameter in adapters.trainable(loaded.model, 0).items()
    }
    save_file(parameters, other / "adapter_model.safetensors")
    adapters.load(loaded.model, other, 1)
    with pytest.raises(InputError, match="expected offsets that half precision holds"):
        adapters.merged(loaded.model, 1)
    adapters.detach(loaded.model, 1)


def test_256_prompts_are_answered_alike(smollm2: Path, live: tuple[LoadedModel, Path], written: Path) -> None:
    """Unmerged over the base, and from the written file: greedy tokens the same, logits within 1e-5."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "user"]
    prompts = [*asked, *(f"{a} + {b} =" for a in range(16) for b in range(16))][:256]
    greedy = Sampling(temperature=0, max_tokens=4, ignore_end=True)
    with launch(smollm2, {"tuned": live[1]}) as engine, launch(written) as other:
        unmerged = engine.generate_many(prompts, greedy, model="tuned")
        assert [a.tokens for a in unmerged] == [a.tokens for a in other.generate_many(prompts, greedy)]
        loaded, merged = engine.loaded, other.loaded
        number = next(iter(loaded.model.attached))
        batch = RaggedBatch.pack([loaded.tokenizer.encode(text) for text in prompts])
        last = (batch.cu_seqlens[1:] - 1).tolist()
        with torch.inference_mode():
            expected, got = (
                model.model.head(model.model(given)[last], given.routes.take(last))
                for model, given in ((loaded, batch.with_adapter(number)), (merged, batch))
            )
        assert (got - expected).abs().max() <= 1e-5


@pytest.mark.llama
def test_llama_cpp_agrees_with_the_written_file_as_it_does_with_the_base(smollm2: Path, written: Path) -> None:
    pytest.importorskip("llama_cpp")
    base, found = with_llama_cpp(smollm2), with_llama_cpp(written)
    print(f"top-1 agreement with llama.cpp: {base} of the base, {found} of what was written")
    assert found >= base - 0.01
    assert base > 0.95
