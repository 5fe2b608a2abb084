"""Keyword score: the share of questions whose answer contains the keyword that a right answer must have.

Rows: {"question": …, "keyword": …}. Answers are greedy; case doesn't matter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.engine import Engine, Sampling
from ftkit.errors import InputError
from ftkit.models import LoadedModel

_ANSWER_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, and what a right answer contains."""

    question: str
    keyword: str


def read(path: Path) -> list[Question]:
    """The questions of a JSONL file. Raises InputError, with the line, for a row that is none."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a file of questions, got {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            question, keyword = row["question"], row["keyword"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f'{path}:{number}: expected {{"question": …, "keyword": …}}, got {line[:80]!r}') from None
        if not (isinstance(question, str) and isinstance(keyword, str) and keyword):
            raise InputError(f"{path}:{number}: expected a question and a keyword as text, got {line[:80]!r}")
        found.append(Question(question=question, keyword=keyword))
    if not found:
        raise InputError(f"{path}: expected questions, got an empty file")
    return found


def answers(engine: Engine, questions: Sequence[Question], model: str | None = None) -> list[str]:
    """Greedy answers, computed together."""
    prompts = [[{"role": "user", "content": question.question}] for question in questions]
    sampling = Sampling(temperature=0.0, max_tokens=_ANSWER_TOKENS)
    return [completion.text.strip() for completion in engine.generate_many(prompts, sampling, model=model)]


def right(question: Question, answer: str) -> bool:
    """Whether the answer contains the keyword."""
    return question.keyword.casefold() in answer.casefold()


def score(questions: Sequence[Question], given: Sequence[str]) -> float:
    """The share of right answers."""
    return sum(map(right, questions, given)) / len(questions)


def evaluate(
    loaded: LoadedModel, adapter: Path | None, data: Path | None, against: LoadedModel | None
) -> dict[str, Any]:
    """The score over the questions in `data`, and that of `against`."""
    if data is None:
        raise InputError("--data: expected a file of questions, got none")
    questions = read(data)
    table: dict[str, Any] = {"questions": len(questions)}
    with Engine(loaded) as engine:
        if adapter is not None:
            engine.add_adapter("adapter", adapter)
        given = answers(engine, questions, None if adapter is None else "adapter")
    table["score"] = score(questions, given)
    if against is not None:
        with Engine(against) as engine:
            table["score_against"] = score(questions, answers(engine, questions))
    return table
