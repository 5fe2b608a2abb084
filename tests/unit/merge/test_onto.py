"""Merging onto quantized weights: what each way promises of the file, and of the adapter beside it."""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from families import saved
from ftkit import adapters, cli, models
from ftkit.errors import GateError, InputError
from ftkit.eval.parity import Bounds
from ftkit.export import Exported, _publish, export
from ftkit.merge import compare, merge
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch

pytestmark = pytest.mark.unit

WAYS = ["requantized", "compensated", "apart"]


@pytest.fixture(scope="module", params=["q4_1", "q8_0"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in blocks."""
    folder = tmp_path_factory.mktemp(request.param)
    saved(folder / "dense", "qwen2")
    export(str(folder / "dense"), folder / "base.gguf", to="gguf", kind=request.param)
    return folder / "base.gguf"


def lora(base: Path, folder: Path, size: float = 0.02, **options: Any) -> Path:
    """A LoRA of rank 16 over `base` with factors of this size."""
    loaded = models.load(base)
    adapters.attach(loaded.model, "lora", {"rank": 16, "alpha": 16.0, **options}, seed=1)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapters.trainable(loaded.model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * size
    adapters.save(loaded.model, 0, folder, loaded.fingerprint)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return lora(base, tmp_path / "lora")


def matrices(path: Path) -> dict[str, bytes]:
    """The bytes of a file's tensors, as the `gguf` package reads them."""
    return {tensor.name: np.ascontiguousarray(tensor.data).tobytes() for tensor in gguf.GGUFReader(path).tensors}


def log_probabilities(path: Path, folder: Path | None) -> torch.Tensor:
    loaded = models.load(path)
    if folder is not None:
        adapters.load(loaded.model, folder, 0)
    batch = RaggedBatch.pack([list(range(3, 40))], adapter=-1 if folder is None else 0)
    with torch.inference_mode():
        return loaded.model.head(loaded.model(batch), batch.routes).double().log_softmax(-1)


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def weights(path: Path, folder: Path | None) -> dict[str, torch.Tensor]:
    loaded = models.load(path)
    if folder is None:
        return loaded.model.tensors()
    adapters.load(loaded.model, folder, 0)
    return adapters.merged(loaded.model, 0)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def test_apart_keeps_every_byte_of_the_base_and_of_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    result = merge(str(base), tmp_path / "out.gguf", folders=[adapter], onto="apart")
    assert result.adapter == tmp_path / "out-adapter"
    assert (result.parity.kl_max, result.parity.greedy_match) == (0, 1)
    assert matrices(tmp_path / "out.gguf") == matrices(base)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out-adapter", adapter))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_compensated_keeps_every_code_and_is_nearer_with_more_rank(base: Path, adapter: Path, tmp_path: Path) -> None:
    expected, changed = log_probabilities(base, adapter), weights(base, adapter)
    errors, divergences = [], []
    for rank in (1, 4, 8, 16):
        out = tmp_path / f"rank{rank}.gguf"
        # no gate here: one direction is not enough to pass it
        result = unguarded(str(base), out, folders=[adapter], onto="compensated", rank=rank)
        assert result.adapter is not None
        assert matrices(out) == matrices(base)
        assert LoraConfig.from_pretrained(str(result.adapter)).r == rank
        assert (
            models.load(out).fingerprint == json.loads((result.adapter / "ftkit.json").read_text())["base_fingerprint"]
        )
        errors.append(distance(weights(out, result.adapter), changed))
        divergences.append(divergence(expected, log_probabilities(out, result.adapter)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 1e-6


def unguarded(source: str, out: Path, **options: Any) -> Exported:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_publish, "_allowed", lambda *_: Bounds(kl_mean=100.0, top1=0.0))
        return merge(source, out, **options)


def test_four_bits_lose_a_small_change_and_eight_bits_do_not(base: Path, tmp_path: Path) -> None:
    # half a step of 8 bits is a sixteenth of that of 4
    four = "q4_1" in str(base)
    small = lora(base, tmp_path / "small", size=0.01 if four else 0.03)
    found = compare(str(base), folders=[small])
    requantized, compensated, apart = (found[way].parity for way in WAYS)
    without = found["requantized"].without
    assert without is not None
    assert apart.kl_max == 0 < compensated.kl_mean < 0.5 * without.kl_mean
    assert compensated.passed
    assert requantized.passed != four == (requantized.kl_mean > 0.5 * without.kl_mean)
    assert found["compensated"].adapter_bytes < found["apart"].adapter_bytes
    if four:
        with pytest.raises(GateError, match="where the base without the adapter has KL"):
            merge(str(base), tmp_path / "out.gguf", folders=[small])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("onto", ["compensated", "apart"])
def test_an_adapter_that_changes_nothing_gives_the_base_back(onto: str, base: Path, tmp_path: Path) -> None:
    zero = lora(base, tmp_path / "zero", size=0.0)
    result = merge(str(base), tmp_path / "out.gguf", folders=[zero], onto=onto)
    assert result.parity.kl_max == 0
    assert matrices(tmp_path / "out.gguf") == matrices(base)
    assert (result.adapter is None) == (onto == "compensated") == (not (tmp_path / "out-adapter").exists())


def test_another_type_is_compensated_for_its_own_rounding_too(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The base's rounding to fewer bits is an error as the adapter's is: with the factors the weights are nearer."""
    changed = weights(base, adapter)
    errors = []
    for onto in ("requantized", "apart", "compensated"):
        result = unguarded(str(base), tmp_path / f"{onto}.gguf", folders=[adapter], onto=onto, rank=16, kind="q4_0")
        errors.append(distance(weights(result.out, result.adapter), changed))
    requantized, apart, compensated = errors
    assert compensated < apart
    assert compensated < requantized


def test_layers_without_a_change_get_no_factors(base: Path, tmp_path: Path) -> None:
    one = lora(base, tmp_path / "one", target_modules=["model.layers.1.mlp.up_proj"], size=0.1)
    result = merge(str(base), tmp_path / "out.gguf", folders=[one], onto="compensated")
    assert result.adapter is not None
    keys = load_file(result.adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    assert sorted(keys) == [f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"]


def test_norms_and_embeddings_that_were_trained_whole_are_in_the_file(base: Path, tmp_path: Path) -> None:
    whole = lora(base, tmp_path / "whole", modules_to_save=["model.norm"], size=0.05)
    result = unguarded(str(base), tmp_path / "out.gguf", folders=[whole], onto="compensated", rank=16)
    expected, got = weights(base, whole), weights(result.out, result.adapter)
    assert torch.equal(got["model.norm.weight"], expected["model.norm.weight"])
    assert distance(got, expected) < 1e-4


@pytest.mark.parametrize("onto", ["compensated", "apart"])
def test_both_are_written_or_none(
    onto: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, beside = tmp_path / "out.gguf", tmp_path / "out-adapter"
    merge(str(base), out, folders=[adapter], onto=onto)
    before = {path: path.read_bytes() for path in [out, *beside.iterdir()]}
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match="expected a path that is free"):
        merge(str(base), out, folders=[adapter], onto=onto)
    with monkeypatch.context() as patch:
        patch.setattr(_publish, "_allowed", lambda *_: Bounds(kl_mean=-1.0, top1=0.0))
        with pytest.raises(GateError):
            merge(str(base), out, folders=[adapter], onto=onto, overwrite=True)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == beside and "old" not in self.name:  # the last of the steps
            raise OSError(28, "no space")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(InputError, match="expected room"):
            merge(str(base), out, folders=[adapter], onto=onto, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == names
    assert {path: path.read_bytes() for path in before} == before


def test_a_directory_that_is_no_adapter_is_not_replaced(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out-adapter").mkdir()
    (tmp_path / "out-adapter" / "diary.txt").touch()
    with pytest.raises(InputError, match="expected an adapter to replace"):
        merge(str(base), tmp_path / "out.gguf", folders=[adapter], onto="apart", overwrite=True)
    with pytest.raises(InputError, match="expected a place apart from"):
        merge(str(base), tmp_path / "lo.gguf", folders=[adapter.rename(tmp_path / "lo-adapter")], onto="apart")
    assert (tmp_path / "out-adapter" / "diary.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "out", "--onto", "apart"], "expected --out with a .gguf file"),
        (["--out", "out.gguf", "--onto", "aprat"], "did you mean 'apart'"),
        (["--out", "out.gguf", "--compare"], "expected no --out"),
        ([], "expected a directory or a .gguf file to write, got none"),
        (["--out", "out.gguf", "--onto", "apart", "--adapter", "LORA"], "expected one adapter"),
        (["--compare", "--adapter", "LORA"], "expected one adapter, got 2"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str],
    message: str,
    base: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(adapter) if argument == "LORA" else argument for argument in arguments]
    monkeypatch.setattr("sys.argv", ["ftkit", "merge", str(base), "--adapter", str(adapter), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["lora"]


def test_an_adapter_belongs_to_the_file_that_it_was_written_with(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Compensating for another type's rounding makes an adapter that no other file may have."""
    result = unguarded(str(base), tmp_path / "out.gguf", folders=[adapter], onto="compensated", kind="q4_0")
    assert result.adapter is not None
    loaded: LoadedModel = models.load(result.out)
    adapters.load(loaded.model, result.adapter, 0)
    for wrong, folder in ((base, result.adapter), (result.out, adapter)):
        with pytest.raises(InputError, match="expected an adapter for this base model"):
            adapters.load(models.load(wrong).model, folder, 0)
