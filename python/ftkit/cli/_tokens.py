"""The tokens of a conversation, as the model reads them: where each ends, and how much room they leave."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from ftkit.engine.conversation import Message

_SHADES = ("default", "cyan")


def shown(engine: Any, messages: Sequence[Message], model: str | None) -> Text:
    """The rendered conversation with a bar after each token, and their number; of a server, the number alone.

    Raises FtkitError when a server does not answer.
    """
    text = Text()
    if hasattr(engine, "count"):
        count, room = engine.count(messages, model), ""
    elif hasattr(engine, "encode"):
        tokens = engine.encode(messages)
        count, room = len(tokens), f" of {engine.context_tokens:,}"
        for number, token in enumerate(tokens):
            piece = engine.loaded.tokenizer.decode([token], False)
            # part of a letter has no text of its own
            text.append(f"<{token}>" if "\ufffd" in piece else piece.replace("\n", "⏎"), style=_SHADES[number % 2])
            text.append("│" + "\n" * piece.count("\n"), style="dim")
        if not text.plain.endswith("\n"):
            text.append("\n")
    else:
        return Text("this engine does not tell its tokens")
    return text.append(f"{count:,}{room} tokens")
