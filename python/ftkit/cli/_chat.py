"""The chat's terminal: reads lines, prints answers as they come, and knows the commands."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import NestedCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ftkit.engine import Sampling
from ftkit.engine.conversation import Conversation
from ftkit.errors import FtkitError

_HELP = """\
/adapter [NAME]   answers come from this adapter; without a name: the base model
/system [TEXT]    sets the system prompt; without a text: takes it away
/undo             takes the last question and its answer back
/retry            asks the last question again
/save FILE        appends the conversation to a JSONL file to train on
/stats            tokens and speed so far
/clear            begins anew
/help             this
/quit             leaves (as Ctrl-D does)

Enter sends; Alt-Enter begins a new line. Ctrl-C stops an answer."""


class Chat:
    """A conversation with an engine in a terminal."""

    def __init__(
        self, engine: Any, sampling: Sampling, *, system: str | None, model: str | None, names: list[str]
    ) -> None:
        """`names`: the adapters that may be asked; `model`: the one that is asked first, None for the base model."""
        self._engine = engine
        self._sampling = sampling
        self._conversation = Conversation(system=system)
        self._model = model
        self._names = names
        self._generated = 0
        self._seconds = 0.0
        self._commands: dict[str, Callable[[str], bool]] = {
            "/adapter": self._adapter,
            "/system": self._system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/stats": self._stats,
            "/clear": self._clear,
            "/help": self._help,
            "/quit": lambda _: False,
        }

    def run(self, history: Path | None) -> None:
        """Until the user leaves."""
        completions = dict.fromkeys(self._commands) | {"/adapter": dict.fromkeys(self._names)}
        session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            completer=NestedCompleter.from_nested_dict(completions),
            complete_while_typing=True,
            key_bindings=_keys(),
            multiline=True,
            reserve_space_for_menu=3,
            prompt_continuation="  ",
        )
        print("/help lists the commands; Ctrl-D leaves")
        while True:
            try:
                line = session.prompt("> ").strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if line and not self.take(line):
                return

    def take(self, line: str) -> bool:
        """Handles one input; False when it asks to leave."""
        if not line.startswith("/"):
            self._ask(line)
            return True
        word, _, rest = line.partition(" ")
        command = self._commands.get(word)
        if command is None:
            print(f"expected one of {', '.join(self._commands)}, got {word}")
            return True
        return command(rest.strip())

    def _ask(self, text: str) -> None:
        self._conversation.ask(text)
        began, answer, generated = time.perf_counter(), "", 0
        try:
            for delta in self._engine.stream(self._conversation.messages, self._sampling, model=self._model):
                answer += delta.text
                generated += len(delta.tokens) or bool(delta.text)
                print(delta.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" … stopped", end="")
        except FtkitError as error:
            print(f"error: {error}")
            self._conversation.undo()
            return
        print()
        self._conversation.answer(answer)
        self._generated += generated
        self._seconds += time.perf_counter() - began

    def _adapter(self, name: str) -> bool:
        if name and name not in self._names:
            print(f"expected one of {', '.join(self._names) or 'no adapters'}, got {name}")
        else:
            self._model = name or None
            print(f"answers come from {name or 'the base model'}")
        return True

    def _system(self, text: str) -> bool:
        self._conversation.system = text or None
        print("system prompt set" if text else "no system prompt")
        return True

    def _undo(self, _: str) -> bool:
        question = self._conversation.undo()
        print("nothing to take back" if question is None else f"took back: {question}")
        return True

    def _retry(self, _: str) -> bool:
        question = self._conversation.undo()
        if question is None:
            print("nothing was asked yet")
        else:
            self._ask(question)
        return True

    def _save(self, name: str) -> bool:
        if not name:
            print("expected a file, such as /save chats.jsonl")
            return True
        if not self._conversation.turns:
            print("nothing was said yet")
            return True
        try:
            self._conversation.save(Path(name).expanduser())
        except OSError as error:
            print(f"error: {name}: expected a file that can be written, got: {str(error.strerror).lower()}")
        else:
            print(f"saved to {name}")
        return True

    def _stats(self, _: str) -> bool:
        speed = self._generated / self._seconds if self._seconds else 0.0
        print(f"{len(self._conversation.turns)} messages, {self._generated} tokens generated, {speed:.1f} tokens/s")
        return True

    def _clear(self, _: str) -> bool:
        self._conversation.turns.clear()
        print("a new conversation")
        return True

    def _help(self, _: str) -> bool:
        print(_HELP)
        return True


def one_shot(
    engine: Any, question: str, sampling: Sampling, *, system: str | None, model: str | None, show: bool
) -> Any:
    """One answer, written to standard output as it grows if `show`; the JSON document that tells of it."""
    conversation = Conversation(system=system)
    conversation.ask(question)
    text, generated, reason = "", 0, None
    for delta in engine.stream(conversation.messages, sampling, model=model):
        text += delta.text
        generated = delta.completion_tokens or generated
        reason = delta.finish_reason or reason
        if show:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    if show:
        sys.stdout.write("\n")
    return {"text": text, "tokens": generated, "finish_reason": reason}


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter breaks the line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
