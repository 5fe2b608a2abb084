"""Ask an index again every few tokens, and write under the passages that it finds; guesses make it faster, not other.

    passages₁ + question → 16 tokens │ passages₂ + question + those 16 → 16 more │ …

What is looked for is the question and the last tokens of the answer; the passages stand before the question, so that
what was said before keeps its keys and values in the pool, and passages that come back find theirs. Every answer is
the one of iterative retrieval without speculation, token by token, greedy or with a seed: which passages each part of
it was written under is checked before it is shown.

When to choose it: for questions about texts that the model was not trained on; the answer names its sources.

Source: Ram et al., In-Context Retrieval-Augmented Language Models, 2023, arXiv 2302.00083; Zhang et al., Accelerating
Retrieval-Augmented Language Model Serving with Speculation, 2024, arXiv 2401.14021.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

from ftkit.engine.decode._speculation import Ids, Segment, plain, speculative
from ftkit.engine.decode._stride import Costs, Stride
from ftkit.engine.decode._visible import Visible
from ftkit.engine.engine import DEFAULT, Completion, Delta, Engine, Prompt, Token
from ftkit.engine.indices import Collection, Index, Passage
from ftkit.engine.sampling import Sampling
from ftkit.errors import InputError

QUERY_TOKENS = 32
"""Of the answer's end, in a query; Ram et al. found 32 best for BM25."""
QUESTION_CHARACTERS = 1000
"""Of the question's end, in a query: no longer than a passage."""
_GOLDEN = 0x9E3779B97F4A7C15
"""Odd, so that no two positions of an answer have the same seed."""

Submit: TypeAlias = Callable[[list[int], int, Sampling], Iterator[Delta]]
"""Asks for what follows these tokens, the last so many of which are of the answer."""


@dataclass(frozen=True)
class Sourced(Delta):
    """What became visible of an answer; the last one names the passages that it was written under."""

    sources: tuple[Passage, ...] = ()
    stop: int | None = None
    """The number of the stop string that ended it, if one did."""


@dataclass(frozen=True)
class SourcedCompletion(Completion):
    """A whole answer, and the passages that it was written under, in the order of their first use."""

    sources: tuple[Passage, ...] = ()


class Retrieving:
    """An engine whose answers are written under what an index finds. For several threads, one answer at a time each."""

    def __init__(
        self,
        engine: Engine,
        collection: Collection,
        index: Index,
        *,
        passages: int = 1,
        every: int = 16,
        speculate: bool = True,
        overlap: bool = True,
        stride: int | None = None,
    ) -> None:
        """Over `engine`, which closes with it.

        `passages`: how many at a time; `every`: tokens after which the index is asked again. `speculate`: guesses from
        what was found before, and verifies; `overlap`: may write on meanwhile; `stride`: always so many guesses (1 or
        more), instead of as many as pay. Raises InputError for numbers out of bounds.
        """
        for name, number in (("passages", passages), ("every", every), ("stride", stride)):
            if number is not None and number < 1:
                raise InputError(f"{name}: expected 1 or more, got {number}")
        self._engine, self._collection, self._index = engine, collection, index
        self._count, self._every = passages, every
        self._speculate, self._overlap, self._stride = speculate, overlap, stride
        self._costs = Costs()
        # a thread of its own, also without speculation: what torch computes in it does not depend on the caller's
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="index")
        self.loaded = engine.loaded
        self.name, self.default = engine.name, engine.default

    @property
    def models(self) -> list[str]:
        """The names that requests may ask for."""
        return self._engine.models

    def stream(
        self, prompt: Prompt, sampling: Sampling = DEFAULT, *, model: str | None = None, submit: Submit | None = None
    ) -> Iterator[Sourced]:
        """An answer as it grows, `every` tokens at a time.

        `prompt`: a conversation that ends with a question, or a text, before which passages are put. `submit` asks for
        a part of it, where that isn't the engine with `model`. Raises InputError
        for a prompt or parameters that can't be answered, FtkitError when the queue is full or the step fails.
        """
        if submit is None:

            def submit(tokens: list[int], answered: int, part: Sampling) -> Iterator[Delta]:
                return self._engine.stream(tokens, part, model=model, answered=answered)

        task = _Task(self._engine, self._collection, prompt, sampling, submit, self._every)
        if self._speculate:
            stride = Stride(self._costs, overlap=self._overlap, fixed=self._stride)
            segments = speculative(self._index, self._query(task), task.write, self._count, self._pool, stride)
        else:
            segments = plain(self._index, self._query(task), task.write, self._count, self._pool)
        return self._shown(segments, sampling)

    def generate(self, prompt: Prompt, sampling: Sampling = DEFAULT, *, model: str | None = None) -> SourcedCompletion:
        """A whole answer; arguments and errors as for `stream`."""
        text, last = "", None
        tokens: list[Token] = []
        for last in self.stream(prompt, sampling, model=model):
            text += last.text
            tokens += last.tokens
        assert last is not None  # an answer has an end
        return SourcedCompletion(
            text=text,
            tokens=[token.id for token in tokens],
            finish_reason=last.finish_reason or "stop",
            prompt_tokens=last.prompt_tokens,
            cached_tokens=last.cached_tokens,
            completion_tokens=last.completion_tokens,
            logprobs=None if sampling.logprobs is None else tokens,
            sources=last.sources,
        )

    def close(self) -> None:
        """Closes the engine."""
        self._engine.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _query(self, task: "_Task") -> Callable[[Sequence[int]], Any]:
        return lambda answer: self._index.query(task.looked_for(answer))

    def _shown(self, segments: Iterator[Segment], sampling: Sampling) -> Iterator[Sourced]:
        visible = Visible(self.loaded.tokenizer.stream(), sampling.stop)
        used: dict[int, None] = {}
        usage: tuple[int, int] | None = None
        generated = 0
        for segment in segments:
            used.update(dict.fromkeys(segment.passages))
            usage = usage or segment.usage
            generated += segment.generated
            text, tokens, stopped = visible.push(segment.tokens, last=segment.reason is not None)
            reason = segment.reason if stopped is None else "stop"
            if reason is None:
                if text or tokens:
                    yield Sourced(text, tokens)
                continue
            sources = tuple(self._collection.passages[number] for number in used)
            yield Sourced(text, tokens, reason, *usage, generated, sources, stopped)
            return


class _Task:
    """One answer: its prompt under any passages, and its segments."""

    def __init__(
        self,
        engine: Engine,
        collection: Collection,
        prompt: Prompt,
        sampling: Sampling,
        submit: Submit,
        every: int,
    ) -> None:
        self._engine, self._collection, self._every, self._submit = engine, collection, every, submit
        self._before, self._question, self._after = _parts(prompt)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        # stop strings may begin in one segment and end in another: they are looked for in the whole answer
        self._sampling = replace(sampling, seed=seed, stop=())
        self._tokens: dict[Ids, list[int]] = {}

    def looked_for(self, answer: Sequence[int]) -> str:
        """The text of a query."""
        end = self._engine.loaded.tokenizer.decode(list(answer[-QUERY_TOKENS:]))
        return f"{self._question[-QUESTION_CHARACTERS:]}\n{end}"

    def write(self, passages: Ids, answer: Sequence[int], give_up: Callable[[], bool]) -> Segment | None:
        """The next tokens under these passages; None when told to give up."""
        tokens = [*self._prompt(passages), *answer]
        most, sampling = self._sampling.max_tokens, self._sampling
        if answer and len(tokens) >= self._engine.longest:
            return Segment(passages=passages, tokens=(), reason="length")
        count = self._every if most is None else min(self._every, most - len(answer))
        assert sampling.seed is not None
        how = replace(sampling, max_tokens=count, seed=(sampling.seed + len(answer) * _GOLDEN) % 2**64)
        found: list[Token] = []
        for delta in self._submit(tokens, len(answer), how):
            found += delta.tokens
            reason = delta.finish_reason
            if reason is None:
                if give_up():
                    return None
                continue
            if reason == "length" and len(found) == self._every and len(answer) + self._every != most:
                reason = None
            return Segment(
                passages=passages,
                tokens=tuple(found),
                reason=reason,
                generated=delta.completion_tokens,
                usage=(delta.prompt_tokens, delta.cached_tokens),
            )
        return None

    def _prompt(self, passages: Ids) -> list[int]:
        known = self._tokens.get(passages)
        if known is None:
            known = self._tokens[passages] = self._engine.encode(self._under(passages))
        return known

    def _under(self, passages: Ids) -> Prompt:
        """The prompt with passages before its question."""
        texts = [self._collection.passages[number].text for number in passages]
        if self._after is None:
            return "\n\n".join([*texts, self._question])
        head = [] if not texts else ["Passages that may help:", *(f"[{i}] {text}" for i, text in enumerate(texts, 1))]
        asked = {"role": "user", "content": "\n\n".join([*head, self._question])}
        return [*self._before, asked, *self._after]


def _parts(
    prompt: Prompt,
) -> tuple[Sequence[Mapping[str, Any]], str, Sequence[Mapping[str, Any]] | None]:
    """The messages before the question, the question, and the messages after it; None after for a plain text."""
    if isinstance(prompt, str):
        return (), prompt, None
    messages: list[Any] = list(prompt)
    if not all(isinstance(message, Mapping) for message in messages):
        raise InputError("prompt: expected a text or messages with retrieval, got token ids")
    for number in reversed(range(len(messages))):
        message = messages[number]
        if message.get("role") == "user":
            if not isinstance(message.get("content"), str):
                raise InputError("messages: expected a question that is a text, with retrieval, got another")
            return messages[:number], message["content"], messages[number + 1 :]
    raise InputError("messages: expected one of the user's with retrieval, got none")
