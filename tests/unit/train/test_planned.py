"""The plan of a run is an upper bound of the tensors that the run counts, and close.

That of the process is held against runs of their own, in tests/model/test_examples.py: here the process has a history.
"""

from collections.abc import Callable
from typing import Any

import pytest

from ftkit import train
from ftkit.config import RunConfig

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__activation_checkpointing": True},
        {"training__offload": "activations", "data__max_tokens": 512},
        {"training__batch_rows": 2, "training__gradient_accumulation_steps": 2},
        {"data__train_on": "all"},
        {"method__name": "full"},
        {"method__name": "full", "training__optimizer_in_backward": True, "training__max_gradient_norm": 0.0},
        {"evaluation__split": 0.2, "training__batch_rows": 3},
        {"model__dtype": "bfloat16"},
        {"training__precision": "int8"},
        {"objective__name": "distill"},
        {"method__name": "qalora", "method__variant": "joint", "objective__name": "distill", "data__train_on": "all"},
    ],
    ids=str,
)
def test_the_plan_bounds_the_run(settings: Callable[..., dict[str, Any]], changes: dict[str, Any]) -> None:
    table = settings(**changes)
    if "method__name" in changes:
        given = {key.replace("__", ".") for key in changes}
        table = {key: value for key, value in table.items() if not key.startswith("method.") or key in given}
    heard: list[dict[str, Any]] = []
    result = train.run(RunConfig.from_toml(None, table | {"training.max_steps": 3}), heard.append)
    assert result.planned_peak_bytes is not None
    (rehearsal,) = [event for event in heard if event["event"] == "memory"]
    assert rehearsal["peak_bytes"] <= result.peak_bytes
    assert rehearsal["planned_peak_bytes"] == result.planned_peak_bytes
    assert result.peak_bytes <= result.planned_peak_bytes <= 1.01 * result.peak_bytes
