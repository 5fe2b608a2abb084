"""The quickstart's data is what its README says."""

import json
from collections import Counter

import pytest

from ftkit.eval import keywords
from ftkit.recipes.quickstart import DATA

pytestmark = pytest.mark.unit

ROWS = [json.loads(line)["messages"] for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
HELD_OUT = keywords.read(DATA / "held_out.jsonl")


def test_counts() -> None:
    assert len(ROWS) == 140
    assert len(HELD_OUT) == 40
    assert set(Counter(question.keyword for question in HELD_OUT).values()) == {2}


def test_no_held_out_question_is_trained_on() -> None:
    asked = {message["content"].casefold() for row in ROWS for message in row if message["role"] == "user"}
    assert not asked & {question.question.casefold() for question in HELD_OUT}


def test_every_fact_is_taught_in_seven_ways() -> None:
    taught = [
        (row[at - 1]["content"], message["content"])
        for row in ROWS
        for at, message in enumerate(row)
        if message["role"] == "assistant"
    ]
    for keyword in {question.keyword for question in HELD_OUT}:
        assert len({asked for asked, answer in taught if keyword in answer}) >= 7, keyword


def test_score_counts_answers_with_their_keyword() -> None:
    questions = HELD_OUT[:2]
    assert keywords.score(questions, [f"It is {questions[0].keyword.upper()}!", "No idea."]) == 0.5
