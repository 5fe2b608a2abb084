"""Adapters on disk: in the pool while they are used, one generation a name at a time, none in another's way."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ftkit import adapters, models
from ftkit.engine import Completion, Engine, Sampling
from ftkit.errors import FtkitError, InputError
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch

pytestmark = pytest.mark.model

GREEDY = Sampling(temperature=0.0, max_tokens=5, logprobs=2, ignore_end=True)
PROMPT = "The lighthouse keeper wrote down every ship that passed"
RANKS = [1, 2, 5, 8, 16, 3, 4, 7]


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return models.load(smollm2, quant="gguf")


@pytest.fixture(scope="module")
def folders(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRAs of different ranks on different layers, and one that trains a norm as well, which is no LoRA."""
    root = tmp_path_factory.mktemp("shelf")
    found = []
    for number, rank in enumerate(RANKS):
        options: dict[str, Any] = {
            "rank": rank,
            "target_modules": ("q_proj", "down_proj") if number % 2 else "all-linear",
        }
        if number == 7:
            options["modules_to_save"] = ("model.norm",)
        adapters.attach(loaded.model, "lora", options, seed=number, adapter_id=90)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in adapters.trainable(loaded.model, 90).items():
                if "lora" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
                else:
                    parameter.mul_(0.9)
        adapters.save(loaded.model, 90, root / str(number))
        adapters.detach(loaded.model, 90)
        found.append(root / str(number))
    return found


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    # 60 pages: an adapter of rank 16 takes 29 of them
    with Engine(loaded, pool_bytes=60 * 737280, context_tokens=256) as engine:
        yield engine


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def recomputed(loaded: LoadedModel, folder: Path, answer: Completion, prompt: list[int]) -> None:
    """Holds an answer to the model with the adapter attached in the ordinary way, without a cache."""
    adapters.load(loaded.model, folder, 95)
    try:
        with torch.inference_mode():
            batch = RaggedBatch.pack([prompt + answer.tokens], adapter=95)
            routes = RaggedBatch.pack([[0] * len(answer.tokens)], adapter=95).routes
            hidden = loaded.model(batch)[len(prompt) - 1 : -1]
            expected = loaded.model.head(hidden, routes).log_softmax(-1)
    finally:
        adapters.detach(loaded.model, 95)
    assert answer.logprobs is not None
    for token, row in zip(answer.logprobs, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=2e-3)
        assert token.id == int(row.argmax())


def test_more_adapters_than_the_pool_holds(loaded: LoadedModel, folders: list[Path], engine: Engine) -> None:
    names = [f"adapter {number}" for number in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        engine.add_adapter(name, folder, unread=True)
    assert not loaded.model.attached
    prompt = engine.encode(PROMPT)
    together = engine.generate_many([prompt] * 16, GREEDY, model=names * 2)
    until(lambda: engine.metrics["blocks_used"] == 0)
    assert 0 < engine.metrics["adapters_resident"] < len(names)
    for number, folder in enumerate(folders):
        recomputed(loaded, folder, together[number], prompt)
        assert together[number].tokens == together[number + 8].tokens
    # beside other LoRAs, and alone after others took its pages, each answers the same to the bit
    lora = engine.generate_many([prompt] * 7, GREEDY, model=names[:7])
    for number in (4, 0, 6):
        assert engine.generate(prompt, GREEDY, model=names[number]).logprobs == lora[number].logprobs
    for name in names:
        engine.remove_adapter(name)
    until(lambda: not loaded.model.attached)
    until(lambda: engine.metrics["adapters_resident"] == 0)


def test_running_answers_keep_the_generation_that_they_began_with(folders: list[Path], engine: Engine) -> None:
    long = Sampling(temperature=0.0, max_tokens=60, ignore_end=True)
    engine.add_adapter("mine", folders[0])
    old = engine.generate(PROMPT, long, model="mine")
    stream = engine.stream(PROMPT, long, model="mine")
    first = next(stream).text
    engine.add_adapter("mine", folders[2], replace=True)
    new = engine.generate(PROMPT, long, model="mine")
    assert first + "".join(delta.text for delta in stream) == old.text
    assert new.text != old.text
    assert new.cached_tokens == 0
    until(lambda: engine.metrics["adapters_resident"] == 1)
    with pytest.raises(InputError, match="in use"):
        engine.add_adapter("mine", folders[0])
    assert engine.generate(PROMPT, long, model="mine").text == new.text


def test_a_cold_adapter_does_not_stall_others(folders: list[Path], engine: Engine) -> None:
    engine.add_adapter("cold", folders[0], unread=True)
    shelf, fetch = engine._step.shelf, engine._step.shelf.fetch
    gate = threading.Event()

    def slow(adapter: int) -> tuple[int, str]:
        gate.wait(30)
        return fetch(adapter)

    shelf.fetch = slow  # type: ignore[method-assign]
    waiting = engine.stream(PROMPT, GREEDY, model="cold")
    assert engine.generate(PROMPT, GREEDY).tokens
    assert engine.metrics["requests_waiting"] == 1
    gate.set()
    assert next(waiting).text


def test_what_is_no_adapter_fails_its_requests(folders: list[Path], engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected an adapter's directory"):
        engine.add_adapter("nothing", tmp_path / "nothing")
    engine.add_adapter("nothing", tmp_path / "nothing", unread=True)
    with pytest.raises(FtkitError, match="expected an adapter's directory"):
        engine.generate(PROMPT, GREEDY, model="nothing")
    folder = tmp_path / "changing"
    folder.mkdir()
    for file in folders[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    engine.add_adapter("changing", folder)
    for file in folders[2].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FtkitError, match="expected the files that were added"):
        engine.generate(PROMPT, GREEDY, model="changing")
    with Engine(engine.loaded, pool_bytes=20 * 737280) as small:
        small.add_adapter("large", folders[4])
        with pytest.raises(InputError, match="leaves room"):
            small.generate(PROMPT, GREEDY, model="large")
    assert engine.generate(PROMPT, GREEDY).tokens
