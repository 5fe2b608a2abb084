"""The engine on the real model: the cache changes nothing, callers don't disturb each other, and it can be stopped."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ftkit import adapters, models
from ftkit.engine import Completion, Engine, Sampling
from ftkit.engine._step import ModelStep
from ftkit.errors import FtkitError, InputError
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch

pytestmark = pytest.mark.model

QUESTIONS = ["What is the capital of France?", "Write a haiku about rain.", "def fibonacci(n):", "Why is the sky blue?"]


def chat(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


def greedy(count: int, **more: Any) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=count, **more)


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> LoadedModel:
    return models.load(smollm2)


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    with Engine(loaded, max_batch_tokens=48, max_sequences=8, max_waiting=64, pool_bytes=128 << 20) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Completion]:
    return [engine.generate(chat(question), greedy(10)) for question in QUESTIONS]


def recomputed(loaded: LoadedModel, prompt: list[int], count: int, adapter: int = -1) -> list[int]:
    """Greedy tokens without a cache: the whole sequence again for every token."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            batch = RaggedBatch.pack([tokens], adapter=adapter)
            tokens.append(int(loaded.model.head(loaded.model(batch)[-1:]).argmax()))
            if tokens[-1] in loaded.tokenizer.end_ids:
                return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_the_cache_changes_no_token(loaded: LoadedModel, engine: Engine, alone: list[Completion]) -> None:
    for question, answer in zip(QUESTIONS[:2], alone, strict=False):
        assert answer.tokens == recomputed(loaded, engine.encode(chat(question)), 10)


def test_a_crowd_gets_the_same_answers(engine: Engine, alone: list[Completion]) -> None:
    # 16 at once: more than run together, with prompts that are cut in chunks.
    together = engine.generate_many([chat(question) for question in QUESTIONS * 4], greedy(10))
    assert [answer.text for answer in together] == [answer.text for answer in alone] * 4


def test_a_seed_repeats_itself_in_a_crowd(engine: Engine) -> None:
    how = Sampling(seed=7, max_tokens=8)
    first = engine.generate(chat(QUESTIONS[1]), how)
    many = engine.generate_many([chat(QUESTIONS[1])] * 4, [how, Sampling(seed=8, max_tokens=8), how, greedy(8)])
    assert first.tokens == many[0].tokens == many[2].tokens != many[1].tokens


def test_a_stream_is_the_answer_in_pieces(engine: Engine, alone: list[Completion]) -> None:
    deltas = list(engine.stream(chat(QUESTIONS[0]), greedy(10)))
    assert "".join(delta.text for delta in deltas) == alone[0].text
    assert [token.id for delta in deltas for token in delta.tokens] == alone[0].tokens
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert (deltas[-1].finish_reason, deltas[-1].completion_tokens) == ("stop", len(alone[0].tokens) + 1)


def test_stop_strings_end_the_answer_and_never_show(engine: Engine, alone: list[Completion]) -> None:
    text = alone[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 7]  # in the middle of words
    deltas = list(engine.stream(chat(QUESTIONS[0]), greedy(10, stop=(stop,), logprobs=0)))
    shown = ""
    for delta in deltas:
        shown += delta.text
        assert text[: text.index(stop)].startswith(shown)
    assert shown == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop"


def test_logprobs_are_the_models(loaded: LoadedModel, engine: Engine) -> None:
    prompt = engine.encode(QUESTIONS[2])
    answer = engine.generate(prompt, Sampling(max_tokens=4, seed=3, temperature=0.7, top_k=5, logprobs=3))
    assert answer.logprobs is not None
    with torch.inference_mode():
        batch = RaggedBatch.pack([prompt + answer.tokens])
        expected = loaded.model.head(loaded.model(batch)[len(prompt) - 1 : -1]).log_softmax(-1)
    for token, row in zip(answer.logprobs, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-3)
        assert [id for id, _ in token.top] == row.topk(3).indices.tolist()


def test_closing_a_stream_frees_its_pages(engine: Engine) -> None:
    stream = engine.stream(chat(QUESTIONS[1]), greedy(400, ignore_end=True))
    next(stream)
    assert engine.metrics["blocks_used"] > 0
    stream.close()  # type: ignore[attr-defined]
    until(lambda: engine.metrics["blocks_used"] == 0)


def test_few_pages_only_make_it_slower(loaded: LoadedModel, alone: list[Completion]) -> None:
    # 11 pages of 8 tokens: two prompts of 36 tokens fit, and their answers one after the other
    with Engine(loaded, block_tokens=8, pool_bytes=11 * 8 * 46080, max_sequences=4) as engine:
        together = engine.generate_many([chat(question) for question in QUESTIONS], greedy(10))
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        assert engine.metrics["preemptions_total"] == 0  # they said how long they may become


@pytest.mark.parametrize("backends", ["", "reference"])
def test_a_step_that_fails_fails_its_requests_only(
    engine: Engine, alone: list[Completion], backends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setenv("FTKIT_KERNELS", backends)
        patched.setattr(ModelStep, *(("__call__", broken) if backends else ("whole", property(broken))))
        with pytest.raises(FtkitError, match="RuntimeError: out of luck"):
            engine.generate(chat(QUESTIONS[0]), greedy(10))
    assert engine.generate(chat(QUESTIONS[0]), greedy(10)).text == alone[0].text
    until(lambda: engine.metrics["blocks_used"] == 0)


def test_prompts_that_cannot_be_answered(engine: Engine) -> None:
    for prompt, model, expected in [
        ([], None, "expected at least one token"),
        ([0] * 100_000, None, "expected fewer than"),
        ([10**6], None, "expected token ids below"),
        ("hi", "nobody", "model: expected one of"),
    ]:
        with pytest.raises(InputError, match=expected):
            engine.generate(prompt, greedy(1), model=model)


def test_what_cannot_be_in_time_fails(engine: Engine) -> None:
    late = engine.metrics["requests_late_total"]
    with pytest.raises(FtkitError, match="the first token is due"):
        engine.generate(chat(QUESTIONS[0]) * 5, greedy(1), first_token_seconds=1e-6)
    until(lambda: engine.metrics["requests_late_total"] == late + 1)
    assert engine.generate(chat(QUESTIONS[0]), greedy(1), first_token_seconds=60, priority=8).tokens
    with pytest.raises(InputError, match="priority"):
        engine.generate("hi", greedy(1), priority=9)
    with pytest.raises(InputError, match="first_token_seconds"):
        engine.generate("hi", greedy(1), first_token_seconds=0)


def test_adapters_by_name(loaded: LoadedModel, engine: Engine, tmp_path: Path, alone: list[Completion]) -> None:
    for number, name in enumerate(["one", "two"]):
        adapters.attach(loaded.model, "lora", {"rank": 3}, seed=number, adapter_id=90)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapters.trainable(loaded.model, 90).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        adapters.save(loaded.model, 90, tmp_path / name)
        adapters.detach(loaded.model, 90)
        engine.add_adapter(name, tmp_path / name)
    with pytest.raises(InputError, match="in use"):
        engine.add_adapter("one", tmp_path / "one")
    prompt = engine.encode(chat(QUESTIONS[0]))
    names = [None, "one", "two", "one", None]
    answers = engine.generate_many([prompt] * 5, greedy(6), model=names)
    expected = {None: -1, "one": 91, "two": 92}
    for name, adapter in list(expected.items())[1:]:
        adapters.load(loaded.model, tmp_path / str(name), adapter)
    for name, answer in zip(names, answers, strict=True):
        assert answer.tokens == recomputed(loaded, prompt, 6, expected[name])
    assert answers[0].tokens != answers[1].tokens != answers[2].tokens
    engine.remove_adapter("one")
    engine.remove_adapter("two")
    until(lambda: sorted(loaded.model.attached) == [91, 92])
    for adapter in (91, 92):
        adapters.detach(loaded.model, adapter)
    with pytest.raises(InputError, match="model: expected one of"):
        engine.generate(prompt, greedy(1), model="one")
    assert engine.generate(chat(QUESTIONS[0]), greedy(10)).text == alone[0].text


def test_close_ends_what_is_under_way(loaded: LoadedModel) -> None:
    engine = Engine(loaded, pool_bytes=64 << 20)
    stream = engine.stream("Once upon a time", greedy(500, ignore_end=True))
    next(stream)
    before = threading.active_count()
    engine.close()
    engine.close()
    with pytest.raises(FtkitError, match="shutting down"):
        list(stream)
    assert threading.active_count() <= before
    with pytest.raises(FtkitError, match="closed"):
        engine.generate("hi", greedy(1))


PROGRAM = """
import sys
from ftkit import models
from ftkit.engine import Engine, Sampling
engine = Engine(models.load(sys.argv[1]), pool_bytes=64 << 20)
stream = engine.stream("Once upon a time", Sampling(max_tokens=2000, ignore_end=True))
next(stream)
print("running", flush=True)
if sys.argv[2] == "wait":
    for delta in stream:
        pass
"""


@pytest.mark.parametrize("how", ["exit", "wait"])
def test_the_program_ends_in_the_middle_of_an_answer(smollm2: Path, how: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(smollm2), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        if how == "wait":
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert ("KeyboardInterrupt" in errors) == (how == "wait"), errors
    assert process.returncode == (0 if how == "exit" else -signal.SIGINT), errors
