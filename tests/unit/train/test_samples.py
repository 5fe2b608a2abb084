"""Samples before and after: real prompts of the data, answered by the engine, without a trace in the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftkit import models, train
from ftkit.config import RunConfig
from ftkit.nn.batch import RaggedBatch
from ftkit.train import samples

pytestmark = pytest.mark.unit


def test_a_run_answers_before_and_after_and_trains_the_same(settings: Callable[..., dict[str, Any]]) -> None:
    told: list[dict[str, Any]] = []
    with_samples = settings(output__name="with", output__samples=2, evaluation__split=0.2)
    first = train.run(RunConfig.from_toml(None, with_samples), told.append)
    second = train.run(RunConfig.from_toml(None, settings(output__name="without", evaluation__split=0.2)))
    assert first.adapter_sha256 == second.adapter_sha256
    found = [event for event in told if event["event"] == "sample"]
    assert [(event["moment"], event["number"]) for event in found] == [
        ("before", 0),
        ("before", 1),
        ("after", 0),
        ("after", 1),
    ]
    data = Path(with_samples["data.path"]).read_text()
    for event in found:
        assert f'"{event["prompt"]}"' in data
        assert f'"{event["expected"]}"' in data
    assert found[0]["answer"] != found[2]["answer"]
    report = Path(first.report).read_text()
    assert "Before and after" in report
    assert found[1]["prompt"] in report


def test_full_finetuning_is_sampled_too(settings: Callable[..., dict[str, Any]]) -> None:
    chosen = settings(method__name="full", output__samples=1, training__max_steps=100)
    del chosen["method.rank"], chosen["method.dropout"]
    told: list[dict[str, Any]] = []
    train.run(RunConfig.from_toml(None, chosen), told.append)
    found = {event["moment"]: event["answer"] for event in told if event["event"] == "sample"}
    assert "It is" not in found["before"]
    assert "It is" in found["after"]


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?\nHow?<|im_end|>\n", "Why?\nHow?"),
        ("<|im_start|>user<|im_end|>\n\nWhat is\nit?<|im_start|><|im_end|>assistant<|im_end|>\n\n", "What is\nit?"),
        ("no special tokens", "no special tokens"),
        ("<|im_start|>user<|im_end|>", "user"),
    ],
)  # fmt: skip
def test_the_last_message_is_shown(tiny_model: Path, text: str, question: str) -> None:
    tokenizer = models.load(tiny_model).tokenizer
    assert samples.last_message(tokenizer.encode(text), tokenizer) == question


def test_prompts_end_where_training_begins_and_come_once(tiny_model: Path) -> None:
    tokenizer = models.load(tiny_model).tokenizer
    sequences = [[256, 65, 66, 67], [256, 65, 66, 67], [256, 70, 71], [65, 66, 67], [256, 80, 81, 82, 83]]
    targets = [
        [-100, 66, 67, -100],
        [-100, 66, 67, -100],
        [-100, -100, -100],
        [66, 67, -100],
        [-100, 81, -100, 83, -100],
    ]
    found = samples.examples([RaggedBatch.pack(sequences, targets=targets)], tokenizer, 5)
    assert [example.prompt for example in found] == [(256, 65), (256, 80)]
    assert [example.expected for example in found] == [tokenizer.decode([66, 67]), tokenizer.decode([81])]
    assert len(samples.examples([RaggedBatch.pack(sequences, targets=targets)], tokenizer, 1)) == 1
