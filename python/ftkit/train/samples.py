"""Answers before and after training, to a few prompts of the data: what people look at first.

Prompts are taken from the held-out rows where there are any, cut where the first trained token would come. The engine
that chat and serve use answers, by the likeliest token.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftkit import _core
from ftkit.engine import Engine, Sampling
from ftkit.models import LoadedModel
from ftkit.nn.batch import UNTRAINED, RaggedBatch

_ANSWER = Sampling(temperature=0.0, max_tokens=64)
_MOST_PROMPT_TOKENS = 512  # longer prompts take seconds to read and nobody reads them in a report
_ROLES = {"system", "user", "human", "assistant", "model"}
_NAME = "trained"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt of the data, and the answer that is in the data."""

    prompt: tuple[int, ...]
    """Token ids."""
    question: str
    """The prompt as people read it: its last message."""
    expected: str


def examples(batches: Iterable[RaggedBatch], tokenizer: _core.Tokenizer, count: int) -> list[Example]:
    """The first `count` different prompts in the batches; texts without a prompt are passed over."""
    found: dict[tuple[int, ...], Example] = {}
    for batch in batches:
        assert batch.targets is not None
        tokens, targets = batch.tokens.tolist(), batch.targets.tolist()
        end = 0
        for length, shared in zip(batch.lengths, batch.shared or itertools.repeat(0), strict=False):
            start, end = end, end + length
            trained = [place for place in range(start, end) if targets[place] != UNTRAINED]
            if len(found) == count:
                return list(found.values())
            if shared or not trained or not 2 <= trained[0] - start + 1 <= _MOST_PROMPT_TOKENS:
                continue
            prompt = tuple(tokens[start : trained[0] + 1])
            answer = [targets[place] for place, after in enumerate(trained, trained[0]) if place == after]
            found.setdefault(
                prompt,
                Example(
                    prompt=prompt, question=last_message(prompt, tokenizer), expected=tokenizer.decode(answer).strip()
                ),
            )
    return list(found.values())


def answers(loaded: LoadedModel, asked: Sequence[Example], adapter: Path | None) -> list[str]:
    """The base model's answers, or those under an adapter on disk. Leaves the model in evaluation mode."""
    loaded.model.eval()
    with Engine(loaded, max_sequences=max(1, len(asked))) as engine:
        if adapter is not None:
            engine.add_adapter(_NAME, adapter)
        try:
            prompts = [example.prompt for example in asked]
            made = engine.generate_many(prompts, _ANSWER, model=None if adapter is None else _NAME)
        finally:
            if adapter is not None:
                engine.remove_adapter(_NAME)
    return [completion.text.strip() for completion in made]


def last_message(prompt: Sequence[int], tokenizer: _core.Tokenizer) -> str:
    """The last stretch between special tokens that is more than a role's name; the whole prompt when there is none."""
    stretches: list[list[int]] = [[]]
    for token in prompt:
        if tokenizer.decode([token], skip_special=True) == "":
            stretches.append([])
        else:
            stretches[-1].append(token)
    for stretch in reversed(stretches):
        text = tokenizer.decode(stretch).strip()
        first, _, rest = text.partition("\n")
        text = rest.strip() if first.strip().lower() in _ROLES else text
        if text and text.lower() not in _ROLES:
            return text
    return tokenizer.decode(list(prompt), skip_special=True).strip()
