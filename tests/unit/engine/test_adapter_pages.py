"""LoRAs of one shape go from their files to pages without Python, and answer as any adapter on the model does."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import step_calls
from families import saved
from ftkit import adapters, kernels, models
from ftkit.engine import Completion, Engine, Sampling
from ftkit.errors import FtkitError, InputError
from ftkit.models import LoadedModel
from ftkit.nn.batch import NO_ADAPTER, RaggedBatch

pytestmark = pytest.mark.unit

GREEDY = Sampling(temperature=0.0, max_tokens=7, logprobs=2, ignore_end=True)
PROMPT = "abcabd"
WEIGHTS = "adapter_model.safetensors"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 3, "target_modules": ("q_proj", "down_proj", "lm_head")},
    "ranks": {"rank": 2, "rslora": True, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"up_proj": 7.0}},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    saved(folder, "llama")
    return models.load(folder)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The adapters that are read as any is."""
    found: list[Path] = []
    read = adapters.read

    def noted(shell: Any, folder: Path) -> Any:
        found.append(folder)
        return read(shell, folder)

    monkeypatch.setattr(adapters, "read", noted)
    return found


def written(loaded: LoadedModel, folder: Path, options: dict[str, Any], seed: int, dtype: torch.dtype) -> Path:
    """A random LoRA whose file has numbers of this sort."""
    adapters.attach(loaded.model, "lora", options, seed=seed, adapter_id=90)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model, 90).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapters.save(loaded.model, 90, folder)
    adapters.detach(loaded.model, 90)
    save_file({key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


def engine_of(loaded: LoadedModel, **options: Any) -> Engine:
    return Engine(loaded, pool_bytes=8 << 20, block_tokens=4, **options)


def attached(loaded: LoadedModel, folder: Path) -> Completion:
    """The answer with the adapter on the model's modules."""
    adapters.load(loaded.model, folder, 80)
    try:
        with engine_of(loaded) as engine:
            engine.add_adapter("modules", 80)
            return engine.generate(PROMPT, GREEDY, model="modules")
    finally:
        adapters.detach(loaded.model, 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", OPTIONS)
def test_those_of_a_known_form_have_the_bits_of_those_on_the_model(
    loaded: LoadedModel, tmp_path: Path, reads: list[Path], shape: str, dtype: torch.dtype
) -> None:
    folders = [written(loaded, tmp_path / str(seed), OPTIONS[shape], seed, dtype) for seed in range(3)]
    expected = [attached(loaded, folder).logprobs for folder in folders]
    assert expected[0] != expected[1] != expected[2]
    reads.clear()
    with engine_of(loaded) as engine:
        for folder in folders:
            engine.add_adapter(folder.name, folder, unread=True)
        names = [folder.name for folder in folders]
        together = engine.generate_many([PROMPT] * 3, GREEDY, model=names)
        assert [answer.logprobs for answer in together] == expected
        assert [engine.generate(PROMPT, GREEDY, model=name).logprobs for name in names] == expected
        assert reads == folders[:1]
        assert not loaded.model.attached  # nothing was to be computed by the modules


def test_what_the_core_does_not_compute_the_modules_do(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [written(loaded, tmp_path / str(seed), OPTIONS["plain"], seed, torch.float32) for seed in range(2)]
    norm = {**OPTIONS["plain"], "modules_to_save": ("model.norm",)}
    folders.append(written(loaded, tmp_path / "norm", norm, 2, torch.float32))
    expected = [attached(loaded, folder) for folder in folders]
    names = ["0", "1", "norm"]
    with engine_of(loaded) as engine:
        for name in names:
            engine.add_adapter(name, tmp_path / name)
        alone = engine.generate(PROMPT, GREEDY, model="0")
        mixed = engine.generate_many([PROMPT] * 3, GREEDY, model=names)
        monkeypatch.setenv(kernels.PIN, "reference")
        reference = engine.generate_many([PROMPT] * 3, GREEDY, model=names)
        monkeypatch.delenv(kernels.PIN)
        again = engine.generate(PROMPT, GREEDY, model="0")
    assert not loaded.model.attached
    assert alone.logprobs == expected[0].logprobs == again.logprobs
    for answers in (mixed, reference):
        for answer, right in zip(answers, expected, strict=True):
            assert answer.tokens == right.tokens
            found = [token.logprob for token in answer.logprobs or ()]
            assert found == pytest.approx([token.logprob for token in right.logprobs or ()], abs=1e-4)


def test_two_engines_over_one_model_leave_each_other_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    folders = [written(loaded, tmp_path / str(seed), OPTIONS["plain"], seed, torch.float32) for seed in range(2)]
    expected = [attached(loaded, folder).logprobs for folder in folders]
    with engine_of(loaded) as first:
        first.add_adapter("mine", folders[0])
        assert first.generate(PROMPT, GREEDY, model="mine").logprobs == expected[0]
        with engine_of(loaded) as second:
            second.add_adapter("mine", folders[1])
            assert second.generate(PROMPT, GREEDY, model="mine").logprobs == expected[1]
            assert first.generate(PROMPT, GREEDY, model="mine").logprobs == expected[0]
        assert first.generate(PROMPT, GREEDY, model="mine").logprobs == expected[0]


def test_an_embedding_is_computed_under_what_the_pages_hold_now(loaded: LoadedModel, tmp_path: Path) -> None:
    options = {"rank": 3, "target_modules": ("q_proj", "v_proj", "down_proj")}
    folders = [written(loaded, tmp_path / str(seed), options, seed, torch.float32) for seed in range(2)]
    tokens = [5, 3, 8, 1, 9]
    answers, hidden = [], []
    for folder in folders:
        answers.append(attached(loaded, folder).logprobs)
        adapters.load(loaded.model, folder, 80)
        with torch.inference_mode():
            hidden.append(loaded.model(RaggedBatch.pack([tokens], adapter=80)).mean(0))
        adapters.detach(loaded.model, 80)
    with torch.inference_mode():
        plain = loaded.model(RaggedBatch.pack([tokens])).mean(0)
    distances = [(a - b).abs().max() for a, b in itertools.combinations([plain, *hidden], 2)]
    assert min(distances) > 0.01
    with engine_of(loaded) as roomy:
        roomy.add_adapter("0", folders[0])
        roomy.generate(PROMPT, GREEDY, model="0")
        ((_, pages),) = roomy._step.shelf._in_pages.values()
        page_bytes = roomy._step.cache.pool.shape[1]
    # room for one of them and an answer: each takes the other's pages
    with Engine(loaded, pool_bytes=(len(pages) + 4) * page_bytes, block_tokens=4) as engine:
        shelf = engine._step.shelf
        for number, folder in enumerate(folders):
            engine.add_adapter(str(number), folder)
        for number in (0, 1, 0, 1):
            assert engine.generate(PROMPT, GREEDY, model=str(number)).logprobs == answers[number]
            ((adapter, (_, pages)),) = shelf._in_pages.items()
            free = sorted({*range(engine._step.cache.page_count)} - {*pages})
            pool = engine._step.cache.pool.clone()
            for number_now, expected in ((adapter, hidden[number]), (NO_ADAPTER, plain)):
                found = step_calls.hidden(engine._step, tokens, 0, free, number_now).mean(0)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            engine._step.cache.pool.copy_(pool)  # the pages are known to hold what they held
            assert list(loaded.model.attached) == [adapter]
            # what is on the modules for that changes no answer
            assert engine.generate(PROMPT, GREEDY, model=str(number)).logprobs == answers[number]
    assert not loaded.model.attached


def test_broken_files_of_a_known_form_are_told(loaded: LoadedModel, tmp_path: Path, reads: list[Path]) -> None:
    good, nan, short, other = (
        written(loaded, tmp_path / name, OPTIONS["plain"], 1, torch.float32)
        for name in ("good", "nan", "short", "base")
    )
    tensors = load_file(nan / WEIGHTS)
    key = sorted(tensors)[3]
    tensors[key][0, 1] = float("nan")
    save_file(tensors, nan / WEIGHTS)
    (short / WEIGHTS).write_bytes((short / WEIGHTS).read_bytes()[:-5])
    record = json.loads((other / "ftkit.json").read_text())
    (other / "ftkit.json").write_text(json.dumps(record | {"base_fingerprint": "another"}))
    with engine_of(loaded) as engine:
        engine.add_adapter("good", good)
        for folder, message in ((nan, rf"{key}: expected finite values"), (short, "safetensors"), (other, "this base")):
            with pytest.raises(InputError, match=message):
                engine.add_adapter(folder.name, folder)
            engine.add_adapter(folder.name, folder, unread=True)
            with pytest.raises(FtkitError, match="adapter: "):
                engine.generate(PROMPT, GREEDY, model=folder.name)
        assert engine.generate(PROMPT, GREEDY, model="good").tokens
    assert reads == [good, nan, nan, short, short, other, other]


def test_files_that_change_while_they_are_read_are_refused(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(loaded, tmp_path / "changing", OPTIONS["plain"], 1, torch.float32)
    read = Path.read_bytes

    def slow(path: Path) -> bytes:
        data = read(path)
        if path.name == "adapter_config.json":
            (folder / WEIGHTS).write_bytes(read(folder / WEIGHTS) + b" ")
        return data

    monkeypatch.setattr(Path, "read_bytes", slow)
    with pytest.raises(InputError, match="stay as they are while they are read"):
        adapters.snapshot(folder)
