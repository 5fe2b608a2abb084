"""Turns are added, taken back and saved as rows that training reads."""

import json
from pathlib import Path

import pytest

from ftkit.engine.conversation import Conversation

pytestmark = pytest.mark.unit


def test_undo_takes_a_question_and_its_answer_back() -> None:
    conversation = Conversation(system="Be brief.")
    conversation.ask("a")
    conversation.answer("A")
    conversation.ask("b")
    conversation.answer("B")
    assert conversation.undo() == "b"
    assert [m["content"] for m in conversation.messages] == ["Be brief.", "a", "A"]
    assert conversation.undo() == "a"
    assert conversation.undo() is None


def test_a_question_without_an_answer_makes_way() -> None:
    conversation = Conversation()
    conversation.ask("a")
    conversation.ask("b")
    assert [m["content"] for m in conversation.messages] == ["b"]


def test_saved_conversations_are_rows(tmp_path: Path) -> None:
    conversation = Conversation(system="s")
    conversation.ask("q")
    conversation.answer("ä")
    conversation.save(tmp_path / "chats.jsonl")
    conversation.save(tmp_path / "chats.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert rows == [{"messages": conversation.messages}] * 2
