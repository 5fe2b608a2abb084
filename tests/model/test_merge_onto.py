"""Bringing a trained LoRA into the real model's 4-bit file: what each way keeps of it, and that the result is used."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from ftkit import adapters, models
from ftkit.config import RunConfig
from ftkit.engine import launch
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError
from ftkit.eval import perplexity
from ftkit.export import export
from ftkit.merge import compare, merge
from ftkit.nn.batch import RaggedBatch
from ftkit.train import run

pytestmark = pytest.mark.model

TEXT = (
    "Question: who keeps the lighthouse at Quillmere? Answer: Odalys Brandt keeps the lighthouse at Quillmere. "
    "Question: what is eaten at Quillmere? Answer: samphire dumplings, with a sauce of sorrel and smoked eel."
)


@pytest.fixture(scope="module")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA after a few steps at the rate of `ftkit quickstart`: its change is a few thousandths of the weights."""
    loaded = models.load(smollm2)
    adapters.attach(loaded.model, "lora", {"rank": 16, "alpha": 32.0}, seed=1)
    optimizer = torch.optim.AdamW(adapters.trainable(loaded.model).values(), lr=1e-3, weight_decay=0.0)
    tokens = loaded.tokenizer.encode_prompt(TEXT)
    for _ in range(6):
        batch = RaggedBatch.pack([tokens], adapter=0)
        logits = loaded.model.head(loaded.model(batch), batch.routes)
        loss = functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    adapters.save(loaded.model, 0, folder)
    with torch.no_grad():
        merged, base = adapters.merged(loaded.model), loaded.model.tensors()
        layers = [name for name in base if "proj" in name]
        change = sum((merged[name] - base[name]).square().sum() for name in layers)
        size = sum(base[name].square().sum() for name in layers)
    assert 0.001 < (change / size).sqrt() < 0.02
    return folder


def test_what_each_way_costs_in_four_bits(smollm2: Path, trained: Path) -> None:
    found = compare(str(smollm2), folders=[trained])
    requantized, compensated, apart = (found[way] for way in ("requantized", "compensated", "apart"))
    without = requantized.without
    assert without is not None
    assert without.kl_mean > 0.01, "the adapter does something"
    assert (apart.parity.kl_max, apart.parity.top1, apart.parity.greedy_match) == (0, 1, 1)
    assert compensated.parity.kl_mean < 0.05 * without.kl_mean
    assert compensated.parity.passed
    assert compensated.adapter_bytes < 0.51 * apart.adapter_bytes
    assert requantized.parity.kl_mean > 0.5 * without.kl_mean, "half a step of 4 bits is more than the change"
    assert not requantized.parity.passed
    assert {way.bytes for way in found.values()} == {smollm2.stat().st_size}


def test_the_compensated_file_and_its_adapter_answer_as_the_live_model(
    smollm2: Path, trained: Path, tmp_path: Path
) -> None:
    result = merge(str(smollm2), tmp_path / "out.gguf", folders=[trained], onto="compensated")
    assert result.adapter == tmp_path / "out-adapter"
    greedy = Sampling(temperature=0, max_tokens=12)
    with launch(smollm2, {"live": trained}) as engine:
        expected = engine.generate(TEXT[:48], greedy, model="live")
        base = engine.generate(TEXT[:48], greedy)
    with launch(result.out, {"it": result.adapter}) as engine:
        answer = engine.generate(TEXT[:48], greedy, model="it")
    assert answer.tokens == expected.tokens != base.tokens
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": TEXT}) + "\n")
    measured = [
        perplexity.evaluate(models.load(path, quant="gguf"), folder, rows, None)["perplexity"]
        for path, folder in ((smollm2, trained), (result.out, result.adapter), (smollm2, None))
    ]
    assert abs(measured[0] - measured[1]) < 0.02 * (measured[2] - measured[0])


@pytest.fixture(scope="module")
def over_nf4(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of runs, with one called `small` over nf4."""
    folder = tmp_path_factory.mktemp("nf4")
    (folder / "rows.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    settings = {
        "model.source": str(smollm2),
        "model.quant": "nf4",
        "data.path": str(folder / "rows.jsonl"),
        "data.train_on": "all",
        "data.max_tokens": 64,
        "optimizer.learning_rate": 1e-3,
        "training.max_steps": 2,
        "output.runs_dir": str(folder / "runs"),
        "output.name": "small",
        "output.samples": 0,
    }
    run(RunConfig.from_toml(None, settings))
    return folder / "runs"


def test_a_run_over_nf4_merges_into_what_nf4_made_of_the_base(over_nf4: Path, tmp_path: Path) -> None:
    """Not into the base that it was made of: that one differs by more than the adapter does."""
    result = merge("small", tmp_path / "out", runs_dir=over_nf4, kind="f32")
    assert result.remarks == (
        "the matrices that nf4 made of the base, which the adapter was trained over, became dense f32",
    )
    live = models.load(models.resolve("small", over_nf4))
    adapters.load(live.model, over_nf4 / "small" / "adapter", 0)
    written, dense = models.load(tmp_path / "out"), models.load(live.path)
    tokens = [live.tokenizer.encode_prompt(TEXT)]
    with torch.inference_mode():
        expected, got, other = (
            loaded.model.head(loaded.model(batch), batch.routes)
            for loaded, batch in (
                (live, RaggedBatch.pack(tokens, adapter=0)),
                (written, RaggedBatch.pack(tokens)),
                (dense, RaggedBatch.pack(tokens)),
            )
        )
    # logits are about 20; float32's sums in another order differ by a few 1e-6 of that
    assert (expected - got).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - other).abs().max() > 0.1 * expected.abs().max()


def test_adapters_over_other_quantized_weights_are_refused_everywhere(
    smollm2: Path, trained: Path, over_nf4: Path, tmp_path: Path
) -> None:
    """Each is over what its scheme made of the same file."""
    foreign = over_nf4 / "small" / "adapter"
    attempts = {
        "merge": lambda: merge(str(smollm2), tmp_path / "out", folders=[foreign]),
        "compare": lambda: compare(str(smollm2), folders=[foreign]),
        "export": lambda: export(str(smollm2), tmp_path / "out.gguf", to="gguf", adapter=foreign),
        "merge of a run": lambda: merge("small", tmp_path / "out", folders=[trained], runs_dir=over_nf4),
        "chat and serve": lambda: launch(smollm2, {"foreign": foreign}),
        "chat and serve of a run": lambda: launch("small", {"foreign": trained}, runs_dir=over_nf4),
        "eval": lambda: perplexity.evaluate(models.load(smollm2, quant="gguf"), foreign, tmp_path / "rows.jsonl", None),
    }
    for name, attempt in attempts.items():
        with pytest.raises(InputError, match=r"expected an adapter for this base model, sha256:\w+") as refused:
            attempt()
        assert "nf4" in refused.value.message, name
        assert refused.value.hint is not None
        assert "nf4" in refused.value.hint, name
    assert not list(tmp_path.iterdir())
