"""What a chat shows of answers beside their text: two of them side by side, and how likely each token was."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ftkit.engine import Sampling
from ftkit.engine.conversation import Message
from ftkit.engine.engine import Delta, Token

_COLOURS = ((0.9, "green"), (0.5, "default"), (0.1, "yellow"), (0.0, "red"))
"""From which probability on a token has which colour."""


def answers(
    engine: Any, messages: Sequence[Message], sampling: Sampling, names: Sequence[str | None]
) -> tuple[list[str], int]:
    """Two answers that grow side by side, computed together; the texts, and how many tokens both have."""
    streams: list[Iterator[Delta] | None] = [engine.stream(messages, sampling, model=name) for name in names]
    texts, tokens = ["", ""], 0
    console = Console()
    with Live(_table(names, texts), console=console, refresh_per_second=8, vertical_overflow="visible") as live:
        try:
            while any(stream is not None for stream in streams):
                for side, stream in enumerate(streams):
                    delta = None if stream is None else next(stream, None)
                    if delta is None:
                        streams[side] = None
                        continue
                    texts[side] += delta.text
                    tokens += len(delta.tokens) or bool(delta.text)
                live.update(_table(names, texts))
        except KeyboardInterrupt:
            console.print("… stopped")
        finally:
            for stream in streams:
                close = getattr(stream, "close", None)
                if close is not None:
                    close()
    return texts, tokens


def _table(names: Sequence[str | None], texts: Sequence[str]) -> Table:
    table = Table(expand=True)
    for number, name in enumerate(names, 1):
        table.add_column(f"{number}  {name or 'base model'}", ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts))
    return table


def coloured(engine: Any, tokens: Sequence[Token]) -> Text:
    """Tokens in the colours of their probabilities."""
    return Text().join(Text(_piece(engine, token.id), style=_colour(token.logprob)) for token in tokens)


def alternatives(engine: Any, tokens: Sequence[Token]) -> Text:
    """What else was likely where an answer's tokens were not."""
    shown = Text()
    unsure = [token for token in tokens if token.logprob is not None and token.logprob < math.log(0.5)]
    for token in unsure[:12]:
        others = ", ".join(f"{_quoted(engine, other)} {math.exp(logprob):.2f}" for other, logprob in token.top)
        shown.append(
            f"  {_quoted(engine, token.id)} {math.exp(token.logprob or 0.0):.2f}", style=_colour(token.logprob)
        )
        shown.append(f"   of {others}\n")
    if len(unsure) > 12:
        shown.append(f"  … and {len(unsure) - 12} more below 0.5\n")
    return shown


def _colour(logprob: float | None) -> str:
    probability = 0.0 if logprob is None else math.exp(logprob)
    return next(colour for least, colour in _COLOURS if probability >= least)


def _piece(engine: Any, token: int) -> str:
    piece = getattr(engine, "piece", None)
    return str(piece(token)) if piece is not None else str(engine.loaded.tokenizer.decode([token], False))


def _quoted(engine: Any, token: int) -> str:
    return repr(_piece(engine, token))
