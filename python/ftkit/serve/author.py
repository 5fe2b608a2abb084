"""Answers over HTTP that are written with retrieval: the core asks, `Retrieving` writes."""

import json
import sys
import traceback
from collections.abc import Iterator

from ftkit import _core
from ftkit.engine import Delta, Sampling
from ftkit.engine.decode.retrieval import Retrieving
from ftkit.engine.engine import deltas
from ftkit.errors import FtkitError, InputError


class Author:
    """What the core calls for each answer, on a thread of its own."""

    def __init__(self, retrieving: Retrieving) -> None:
        self._retrieving = retrieving

    def __call__(self, messages: str, sampling: str, pen: _core.Pen) -> None:
        """Answers a conversation; never raises."""
        how = Sampling.from_json(sampling)

        def submit(tokens: list[int], answered: int, part: Sampling) -> Iterator[Delta]:
            return deltas(pen.submit(tokens, answered, part.to_json()))

        try:
            for more in self._retrieving.stream(json.loads(messages), how, submit=submit):
                tokens = [(token.id, token.logprob, list(token.top)) for token in more.tokens]
                if more.finish_reason is None:
                    if not pen.send(more.text, tokens):
                        return
                    continue
                usage = (more.prompt_tokens, more.cached_tokens, more.completion_tokens)
                sources = [(passage.source, passage.text) for passage in more.sources]
                pen.finish(more.text, tokens, more.finish_reason, more.stop, usage, sources)
        except InputError as error:
            pen.fail(error.message, True)
        except FtkitError as error:
            pen.fail(error.message, False)
        except Exception:  # the server goes on; whoever runs it reads why
            traceback.print_exc(file=sys.stderr)
            pen.fail("the answer could not be written; the server's standard error says how", False)
