"""Merging on the real model: what transformers loads is what was live, and a merge that isn't leaves nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftkit import adapters, merge, models
from ftkit.errors import GateError, InputError
from ftkit.nn.batch import RaggedBatch

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters with random weights of the size that training gives."""
    folders = []
    for seed in (0, 1):
        loaded = models.load(smollm2)
        adapters.attach(loaded.model, "lora", {"rank": 4, "target_modules": ["q_proj", "down_proj"]}, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapters.trainable(loaded.model).values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        folders.append(tmp_path_factory.mktemp("adapters") / str(seed))
        adapters.save(loaded.model, 0, folders[-1])
    return folders


def test_transformers_loads_the_merged_model_with_the_live_logits(
    smollm2: Path, trained: list[Path], tmp_path: Path
) -> None:
    result = merge.merge(str(smollm2), tmp_path / "merged", folders=trained[:1], kind="f32")
    assert result.parity.passed
    assert result.parity.greedy_match == 1
    loaded = models.load(smollm2)
    adapters.load(loaded.model, trained[0])
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    talk = [{"role": "user", "content": "Name three rivers."}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    batch = RaggedBatch.pack([ids], adapter=0)
    with torch.no_grad():
        live = loaded.model.head(loaded.model(batch), batch.routes)
        base = loaded.model.head(loaded.model(batch.with_adapter(-1)))
        theirs = peer(torch.tensor([ids])).logits[0]
    assert (live - theirs).abs().max() < 1e-3
    assert (live - base).abs().max() > 0.1, "the adapter does something"


def test_several_adapters_are_summed_by_weight(smollm2: Path, trained: list[Path], tmp_path: Path) -> None:
    result = merge.merge(str(smollm2), tmp_path / "both", folders=trained, weights=[0.25, 0.75], kind="f32")
    assert result.parity.passed
    base = models.load(smollm2).model.tensors()
    expected = {name: tensor.clone() for name, tensor in base.items()}
    for folder, weight in zip(trained, (0.25, 0.75), strict=True):
        loaded = models.load(smollm2)
        adapters.load(loaded.model, folder)
        for name, tensor in adapters.merged(loaded.model).items():
            expected[name] += weight * (tensor - base[name])
    got = models.load(tmp_path / "both").model.tensors()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_merge_that_answers_otherwise_is_refused_and_leaves_nothing(
    smollm2: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = adapters.merged

    def sabotaged(model: "models.Decoder", adapter_id: int = 0) -> dict[str, torch.Tensor]:  # type: ignore[name-defined]
        tensors = original(model, adapter_id)
        name = "model.layers.3.mlp.up_proj.weight"
        return tensors | {name: tensors[name] * 1.5}

    monkeypatch.setattr(adapters, "merged", sabotaged)
    with pytest.raises(GateError, match="expected what was written to answer as the model does"):
        merge.merge(str(smollm2), tmp_path / "merged", folders=trained[:1])
    assert not list(tmp_path.iterdir())


def test_bad_requests(smollm2: Path, trained: list[Path], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(InputError, match="expected a path that is free"):
        merge.merge(str(smollm2), taken, folders=trained[:1])
    with pytest.raises(InputError, match="expected an adapter"):
        merge.merge(str(smollm2), tmp_path / "out")
    with pytest.raises(InputError, match="expected one for each of 2 adapters, got 1"):
        merge.merge(str(smollm2), tmp_path / "out", folders=trained, weights=[1.0])
    with pytest.raises(InputError, match="merge"):
        merge.merge(str(smollm2), tmp_path / "out", folders=trained, how="linaer")
    with pytest.raises(InputError, match="expected a place apart from"):
        merge.merge(str(smollm2), trained[0], folders=trained[:1], overwrite=True)
    assert (trained[0] / "adapter_config.json").is_file()
