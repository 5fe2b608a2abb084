"""Evaluation suites on the real model, against transformers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ftkit import _core, models, plugins
from ftkit.errors import InputError
from ftkit.eval import perplexity

pytestmark = pytest.mark.model

TALKS = [
    [
        {"role": "user", "content": f"What is {n} plus {n}?"},
        {"role": "assistant", "content": f"It is {2 * n}, of course."},
    ]
    for n in range(6)
]


def test_perplexity_equals_transformers(smollm2: Path, peer: Any, tmp_path: Path) -> None:
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    loaded = models.load(smollm2)
    found = perplexity.evaluate(loaded, None, data, models.load(smollm2))
    loss, count = 0.0, 0
    for talk in TALKS:
        assert loaded.template is not None
        ids, trained = _core.encode_conversation(loaded.template, loaded.tokenizer, talk)
        with torch.no_grad():
            logs = peer(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(1, len(ids)):
            if trained[position]:
                loss -= float(logs[position - 1, ids[position]])
                count += 1
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert (found["kl_max"], found["top1"]) == (0.0, 1.0)


@pytest.mark.parametrize("suite", plugins.names("eval"))
def test_every_suite_says_what_it_needs(smollm2: Path, suite: str) -> None:
    with pytest.raises(InputError, match="expected"):
        plugins.load("eval", suite).evaluate(models.load(smollm2), None, None, None)
