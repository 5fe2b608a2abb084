"""A conversation that grows by turns, can be taken back, and can be saved in the form that training reads."""

import json
from dataclasses import dataclass, field
from pathlib import Path

Message = dict[str, str]


@dataclass(kw_only=True)
class Conversation:
    """What was said so far."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    """Messages of user and assistant, in turn."""

    @property
    def messages(self) -> list[Message]:
        """All messages, the system's first."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    def ask(self, text: str) -> None:
        """Adds what the user says; a question that never got an answer makes way."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Adds what the assistant says."""
        self.turns.append({"role": "assistant", "content": text})

    def undo(self) -> str | None:
        """Takes the last question and its answer back; the question, or None when there is none."""
        while self.turns:
            message = self.turns.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def save(self, path: Path) -> None:
        """Appends the conversation to a JSONL file, as a row that `ftkit train` reads."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
