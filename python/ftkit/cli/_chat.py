"""The chat's terminal: reads lines, prints answers as they come, and knows the commands."""

import dataclasses
import difflib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import NestedCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from ftkit.cli import _side_by_side, _tokens
from ftkit.cli._bars import bars
from ftkit.engine import Sampling
from ftkit.engine.conversation import Conversation
from ftkit.errors import FtkitError

_HELP = """\
/adapter [NAME]   answers come from this adapter; alone: from the base model
/system [TEXT]    sets the system prompt; alone: takes it away
/undo             takes the last question and its answer back
/retry            asks the last question again
/save FILE        appends the conversation to a JSONL file to train on
/compare [A B]    two answers at once (`base`: no adapter); alone: one again
/rate up|down     rates the last answer; of two: /rate 1 or /rate 2, the better
/logprobs         shows how likely each token was, or no longer
/tokens           shows the conversation as the model reads it, token by token
/plan [NAME]      the memory that this adapter's training was planned to take
/stats            tokens and speed so far
/clear            begins anew
/help             this
/quit             leaves (as Ctrl-D does)

Enter sends; Alt-Enter begins a new line. Ctrl-C stops an answer."""

_ALONE = "there are no adapters here; `ftkit chat MODEL --adapter NAME=DIR` brings them"


class Chat:
    """A conversation with an engine in a terminal."""

    def __init__(
        self,
        engine: Any,
        sampling: Sampling,
        *,
        system: str | None,
        model: str | None,
        names: list[str],
        rate: Callable[[dict[str, Any]], object] | None = None,
        planned: Callable[[str | None], dict[str, int] | None] | None = None,
    ) -> None:
        """`names`: the adapters that may be asked; `model`: the one that is asked first, None for the base model;
        `rate` takes ratings, in the words of `/v1/feedback`; `planned` knows what an adapter's training was planned
        to take, in bytes by category."""
        self._engine = engine
        self._sampling = sampling
        self._conversation = Conversation(system=system)
        self._model = model
        self._names = names
        self._rate_with = rate
        self._planned = planned
        self._pair: tuple[str | None, str | None] | None = None
        self._both: tuple[tuple[str | None, str | None], list[str]] | None = None
        """The last answers, when there were two: whose they are, and their texts."""
        self._generated = 0
        self._seconds = 0.0
        self._commands: dict[str, Callable[[str], bool]] = {
            "/adapter": self._adapter,
            "/system": self._system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/compare": self._compare,
            "/rate": self._rate,
            "/logprobs": self._logprobs,
            "/tokens": self._tokens,
            "/save": self._save,
            "/plan": self._plan,
            "/stats": self._stats,
            "/clear": self._clear,
            "/help": self._help,
            "/quit": lambda _: False,
        }

    def run(self, history: Path | None) -> None:
        """Until the user leaves."""
        names = dict.fromkeys(self._names)
        completions: dict[str, Any] = dict.fromkeys(self._commands)
        completions |= {
            "/adapter": names,
            "/plan": names,
            "/compare": {name: names | {"base": None} for name in [*names, "base"]},
        }
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
            near = difflib.get_close_matches(word, self._commands, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            print(f"expected a command, got {word}; {hint}")
            return True
        return command(rest.strip())

    def _ask(self, text: str) -> None:
        self._conversation.ask(text)
        began = time.perf_counter()
        try:
            answer, generated = self._two() if self._pair is not None else self._one()
        except FtkitError as error:
            print(f"error: {error}")
            self._conversation.undo()
            return
        self._conversation.answer(answer)
        self._generated += generated
        self._seconds += time.perf_counter() - began

    def _one(self) -> tuple[str, int]:
        """An answer as it grows, and its tokens."""
        answer, generated, tokens = "", 0, []
        sources: Sequence[Any] = ()
        self._both = None
        console = Console()
        try:
            for delta in self._engine.stream(self._conversation.messages, self._sampling, model=self._model):
                answer += delta.text
                generated += len(delta.tokens) or bool(delta.text)
                tokens += delta.tokens
                sources = getattr(delta, "sources", sources)
                if self._sampling.logprobs is not None and delta.tokens:
                    console.print(_side_by_side.coloured(self._engine, delta.tokens), end="", soft_wrap=True)
                else:
                    print(delta.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" … stopped", end="")
        print()
        if sources:
            console.print(_sources(sources), style="dim", markup=False, highlight=False)
        if self._sampling.logprobs is not None and tokens:
            console.print(_side_by_side.alternatives(self._engine, tokens), end="")
        return answer, generated

    def _two(self) -> tuple[str, int]:
        """Two answers side by side; the conversation goes on with the first, until /rate says otherwise."""
        assert self._pair is not None
        found = _side_by_side.answers(self._engine, self._conversation.messages, self._sampling, self._pair)
        texts, generated = found
        self._both = (self._pair, texts)
        print("/rate 1 or /rate 2 says which is better, and goes on with it")
        return texts[0], generated

    def _compare(self, text: str) -> bool:
        if not self._names:
            print(_ALONE)
            return True
        names = text.split()
        unknown = [name for name in names if name != "base" and name not in self._names]
        if unknown or len(names) not in (0, 2):
            known = ", ".join([*self._names, "base"])
            print(f"expected two of {known}, got {text or 'nothing'}")
        elif not names:
            self._pair = None
            print("one answer")
        else:
            first, second = (None if name == "base" else name for name in names)
            self._pair = (first, second)
            print(f"{names[0]} and {names[1]} answer side by side")
        return True

    def _rate(self, word: str) -> bool:
        turns = self._conversation.turns
        expected = "1 or 2" if self._both is not None else "up or down"
        if self._rate_with is None or len(turns) < 2 or turns[-1]["role"] != "assistant":
            print("there is no answer to rate")
            return True
        if word not in expected.split(" or "):
            print(f"expected /rate {expected}, got {word or 'nothing'}")
            return True
        feedback: dict[str, Any] = {"messages": self._conversation.messages[:-1]}
        if self._both is None:
            feedback |= {"model": self._model, "answer": turns[-1]["content"], "rating": word}
        else:
            names, texts = self._both
            better = int(word) - 1
            feedback |= {"model": names[better], "answer": texts[better]}
            feedback |= {"rejected": texts[1 - better], "rejected_model": names[1 - better]}
        try:
            self._rate_with({name: value for name, value in feedback.items() if value is not None})
        except FtkitError as error:
            print(f"error: {error}")
            return True
        turns[-1]["content"] = feedback["answer"]
        print("kept; `ftkit train --data feedback:` learns from it")
        return True

    def _logprobs(self, _: str) -> bool:
        on = self._sampling.logprobs is None
        self._sampling = dataclasses.replace(self._sampling, logprobs=4 if on else None)
        print("the next answers show how likely their tokens were" if on else "answers are text again")
        return True

    def _tokens(self, _: str) -> bool:
        if not self._conversation.messages:
            print("nothing was said yet")
            return True
        try:
            Console().print(_tokens.shown(self._engine, self._conversation.messages, self._model))
        except FtkitError as error:
            print(f"error: {error}")
        return True

    def _adapter(self, name: str) -> bool:
        if not self._names:
            print(_ALONE)
        elif name and name not in self._names:
            print(f"expected one of {', '.join(self._names)}, got {name}")
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

    def _plan(self, name: str) -> bool:
        try:
            found = None if self._planned is None else self._planned(name or self._model)
        except FtkitError as error:
            print(f"error: {error}")
            return True
        if found:
            Console().print(bars(found, sum(found.values())))
        else:
            print(f"expected an adapter whose training is known here, got {name or self._model or 'the base model'}")
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
    text, generated, reason, sources = "", 0, None, None
    for delta in engine.stream(conversation.messages, sampling, model=model):
        text += delta.text
        generated = delta.completion_tokens or generated
        reason = delta.finish_reason or reason
        sources = getattr(delta, "sources", sources)
        if show:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    if show:
        sys.stdout.write("\n")
        if sources:
            print(_sources(sources), file=sys.stderr)
    document = {"text": text, "tokens": generated, "finish_reason": reason}
    if sources is not None:
        document["sources"] = [{"source": passage.source, "text": passage.text} for passage in sources]
    return document


def _sources(passages: Sequence[Any]) -> str:
    """Where the passages stand, each place once."""
    return "sources: " + ", ".join(dict.fromkeys(passage.source for passage in passages))


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
