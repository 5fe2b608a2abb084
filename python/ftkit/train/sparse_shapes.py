"""How many tokens sparse layers keep in a run, for its plan: of its own batches, and in batches that are made up.

What a sparse layer keeps of a batch depends on where its trained tokens are. A plan looks at all batches of the run and
takes the one that keeps most, with as many tokens, trained ones too, as any other has: an upper bound.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ftkit import data
from ftkit.nn.batch import UNTRAINED, RaggedBatch
from ftkit.nn.blocks import BLOCK, Blocks


def largest(share: float, dataset: data.Dataset, batches: Iterable[Sequence[int]]) -> dict[str, Any]:
    """The fields of a `planned.Shape` that needs no less than any of these batches of rows."""
    tokens, trained, most = 0, 0, -1
    found: dict[str, Any] = {}
    for rows in batches:
        batch = dataset.batch(list(rows))
        blocks = Blocks.of(batch.lengths, batch.trained.tolist(), share)
        tokens, trained = max(tokens, len(batch.tokens)), max(trained, len(batch.trained))
        if sum(blocks.kept_lengths) > most:
            most = sum(blocks.kept_lengths)
            found = {"lengths": batch.lengths, "groups": batch.groups, "kept": blocks.kept, "rows": tuple(rows)}
    return {**found, "share": share, "lengths": longer(found["lengths"], tokens), "trained": trained}


def longer(lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The same sequences, the last one so much longer that all have `tokens` tokens; by whole blocks, or its last
    block, which is kept, could become a shorter one."""
    return (*lengths[:-1], lengths[-1] + math.ceil(max(0, tokens - sum(lengths)) / BLOCK) * BLOCK)


def trained_places(
    lengths: Sequence[int], kept: Sequence[int], share: float, trained: int, size: int = BLOCK
) -> list[int]:
    """Places of the stream to train on, so that each sequence keeps at least `kept` blocks, as far as they go, and as
    many of them as can be are anchors."""
    needed: list[int] = []
    anchors: list[int] = []
    beside: list[int] = []
    others: list[int] = []
    start = 0
    for length, count in zip(lengths, kept, strict=True):
        blocks = -(-length // size)
        inside = {*range(count - 1), blocks - 1}
        forced = count > math.ceil(share * blocks)  # more than the share asks for: but for the edges, each has one
        for place in range(length):
            block = place // size
            if block not in inside:
                others.append(start + place)
            elif forced and place % size == 0 and 0 < block < blocks - 1:
                needed.append(start + place)
            elif place % size == 0:
                anchors.append(start + place)
            else:
                beside.append(start + place)
        start += length
    return sorted((needed + anchors + beside + others)[:trained])


def with_few_trained(share: float, lengths: Sequence[int], size: int = BLOCK) -> dict[str, Any]:
    """The fields of a `planned.Shape` of sequences whose trained tokens fit into the blocks that are kept anyway."""
    kept = tuple(min(-(-length // size), max(2, math.ceil(share * -(-length // size)))) for length in lengths)
    return {
        "kept": kept,
        "trained": sum(min(size * count, length) for count, length in zip(kept, lengths, strict=True)),
    }


def dearest(tokens: int) -> RaggedBatch:
    """A batch of so many tokens from which predictors learn at the highest cost: one sequence, with many anchors."""
    targets = [0 if place >= BLOCK and place % (2 * BLOCK) == 0 else UNTRAINED for place in range(tokens)]
    return RaggedBatch.pack([[0] * tokens], targets=[targets], adapter=0)
