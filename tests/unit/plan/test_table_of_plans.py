"""The README's table of what fits on a GPU: every model and method is in it, and what it says is what is computed."""

from pathlib import Path

import pytest
from bench import _plans

pytestmark = pytest.mark.unit


def test_every_model_and_method_is_in_the_table() -> None:
    assert list(_plans.committed()) == [(model, method) for model in _plans.MODELS for method in _plans.METHODS]


def test_the_table_says_what_is_computed(tmp_path: Path) -> None:
    model = _plans.architecture("Llama 3.2 3B", tmp_path)
    said = _plans.committed()["Llama 3.2 3B", "LoRA"][0]  # a cell between the shortest and the longest row
    place = _plans.TOKENS.index(said)
    needed = [_plans.needed(model, _plans.METHODS["LoRA"], tokens) for tokens in _plans.TOKENS[place : place + 2]]
    assert needed[0] <= 8 << 30 < needed[1]
