"""Keys and values that are used again: the same bits as computed anew, and never those of another adapter."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ftkit import adapters, models
from ftkit.engine import Completion, Engine, Sampling
from ftkit.models import LoadedModel

pytestmark = pytest.mark.model

SHARED = "The lighthouse keeper wrote down every ship that passed, its flag, its cargo and the weather of the day. " * 3
GREEDY = Sampling(temperature=0.0, max_tokens=6, logprobs=4, ignore_end=True)


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return models.load(smollm2, quant="gguf")


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    with Engine(loaded, pool_bytes=128 << 20) as engine:
        yield engine


def fresh(loaded: LoadedModel, prompt: str, folder: Path | None = None) -> Completion:
    """The answer of an engine that has seen nothing before."""
    with Engine(loaded, pool_bytes=64 << 20) as engine:
        if folder is not None:
            engine.add_adapter("alone", folder)
        answer = engine.generate(prompt, GREEDY, model=None if folder is None else "alone")
        if folder is not None:
            engine.remove_adapter("alone")
    assert answer.cached_tokens == 0
    return answer


def lora(loaded: LoadedModel, folder: Path, seed: int) -> Path:
    adapters.attach(loaded.model, "lora", {"rank": 4, "target_modules": ("q_proj", "v_proj")}, seed=seed, adapter_id=90)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trainable(loaded.model, 90).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapters.save(loaded.model, 90, folder)
    adapters.detach(loaded.model, 90)
    return folder


def same(found: Completion, expected: Completion) -> None:
    """Tokens and log-probabilities to the bit."""
    assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_another_request_with_the_same_beginning(loaded: LoadedModel, engine: Engine) -> None:
    first = engine.generate(SHARED + "Today it", GREEDY)
    other = engine.generate(SHARED + "Yesterday she", GREEDY)
    again = engine.generate(SHARED + "Today it", GREEDY)
    whole = len(engine.encode(SHARED))
    assert first.cached_tokens == 0
    assert whole - 16 <= other.cached_tokens <= whole
    assert again.cached_tokens == (again.prompt_tokens - 1) // 16 * 16
    same(again, first)
    same(other, fresh(loaded, SHARED + "Yesterday she"))


def test_the_next_turn_starts_after_the_last_answer(loaded: LoadedModel, engine: Engine) -> None:
    turns = [{"role": "user", "content": SHARED}]
    answer = engine.generate(turns, Sampling(temperature=0.0, max_tokens=20, ignore_end=True))
    prompt = [*engine.encode(turns), *answer.tokens, *engine.encode("And then?")]
    second = engine.generate(prompt, GREEDY)
    assert second.cached_tokens > answer.prompt_tokens
    with Engine(loaded, pool_bytes=64 << 20) as other:
        same(second, other.generate(prompt, GREEDY))


def test_adapters_see_their_own(loaded: LoadedModel, engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    lora(loaded, folder, 1)
    engine.generate(SHARED, GREEDY)  # the base model's
    engine.add_adapter("mine", folder)
    first = engine.generate(SHARED, GREEDY, model="mine")
    assert first.cached_tokens == 0
    engine.remove_adapter("mine")
    # the same files under another name: the same pages
    engine.add_adapter("copy", folder)
    copy = engine.generate(SHARED, GREEDY, model="copy")
    assert copy.cached_tokens > 0
    same(copy, first)
    engine.remove_adapter("copy")
    # other files under the old name: none of them
    shutil.rmtree(folder)
    lora(loaded, folder, 2)
    engine.add_adapter("mine", folder)
    anew = engine.generate(SHARED, GREEDY, model="mine")
    engine.remove_adapter("mine")
    assert anew.cached_tokens == 0
    assert anew.tokens != first.tokens
    same(anew, fresh(loaded, SHARED, folder))


def test_an_adapter_on_the_model_is_not_cached(loaded: LoadedModel, engine: Engine) -> None:
    adapters.attach(loaded.model, "lora", {"rank": 4}, seed=0, adapter_id=70)
    try:
        engine.add_adapter("live", 70)
        for _ in range(2):
            assert engine.generate(SHARED, GREEDY, model="live").cached_tokens == 0
        engine.remove_adapter("live")
    finally:
        adapters.detach(loaded.model, 70)
