"""The blocks of a ragged batch: each sequence cut every 64 tokens, and how many of its blocks are kept.

Always kept are blocks with a trained token, a sequence's first (attention rests there) and its last. Of the others so
many are kept that it makes the share that was asked for. Which ones is decided on the device; how many, and so every
shape, by lengths and trained places alone.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 64
"""Tokens of a block, as in the paper that `sparse_tokens` follows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """The blocks of N sequences."""

    size: int
    share: float
    """Of a sequence's blocks that are kept."""
    starts: tuple[int, ...]
    """Of each block, its first token in the stream."""
    ends: tuple[int, ...]
    """The token after its last."""
    sequence: tuple[int, ...]
    """The sequence that it is of."""
    firsts: tuple[int, ...]
    """Of each sequence, its first block; and the number of blocks."""
    anchors: tuple[int, ...]
    """The blocks that have a trained token, in order."""
    always: frozenset[int]
    """Those that are kept whatever is in them."""

    @classmethod
    def of(cls, lengths: Sequence[int], trained: Sequence[int], share: float, size: int = BLOCK) -> "Blocks":
        """Of sequences of these lengths, trained on at these places of the stream, in order."""
        starts: list[int] = []
        ends: list[int] = []
        sequence: list[int] = []
        firsts, token = [0], 0
        for number, length in enumerate(lengths):
            begins = range(token, token + length, size)
            token += length
            starts += begins
            ends += [min(begin + size, token) for begin in begins]
            sequence += [number] * len(begins)
            firsts.append(len(starts))
        anchors: list[int] = []
        block = 0
        for place in trained:
            while ends[block] <= place:
                block += 1
            if not anchors or anchors[-1] != block:
                anchors.append(block)
        edges = {block for first, end in itertools.pairwise(firsts) if first < end for block in (first, end - 1)}
        return cls(
            size=size,
            share=share,
            starts=tuple(starts),
            ends=tuple(ends),
            sequence=tuple(sequence),
            firsts=tuple(firsts),
            anchors=tuple(anchors),
            always=frozenset({*edges, *anchors}),
        )

    @functools.cached_property
    def kept(self) -> tuple[int, ...]:
        """Of each sequence, the blocks that are kept."""
        forced = [0] * (len(self.firsts) - 1)
        for block in self.always:
            forced[self.sequence[block]] += 1
        counts = (end - first for first, end in itertools.pairwise(self.firsts))
        return tuple(max(math.ceil(self.share * count), least) for count, least in zip(counts, forced, strict=True))

    @functools.cached_property
    def kept_lengths(self) -> tuple[int, ...]:
        """Of each sequence, the tokens that are kept: only its last block may be short, and that is among them."""
        lasts = (end - 1 for end in self.firsts[1:])
        short = (self.size - (self.ends[last] - self.starts[last]) for last in lasts)
        return tuple(self.size * count - lacks if count else 0 for count, lacks in zip(self.kept, short, strict=True))

    def choose(self, scores: Tensor) -> Tensor:
        """Scores [blocks] to the rows of the stream that are kept, i64 [kept tokens], in order."""
        kept = self.choose_blocks(scores)[self.on(scores.device).block_of]
        # a place for each, and so no wait for the device: what is kept comes first, in the order of the stream
        return (~kept).to(torch.uint8).argsort(stable=True)[: sum(self.kept_lengths)]

    def choose_blocks(self, scores: Tensor) -> Tensor:
        """Scores [blocks] to bool [blocks]: of each sequence those with the highest, the first of equal ones."""
        places = self.on(scores.device)
        scores = scores.nan_to_num(nan=0.0).masked_fill(~places.free, float("inf"))
        order = scores.argsort(descending=True, stable=True)
        order = order[places.sequence[order].argsort(stable=True)]  # sequence after sequence, the best first
        return torch.zeros_like(places.free).index_fill_(0, order[places.best], True)

    def with_anchors(self, most: int) -> "Blocks":
        """The same blocks, with at most so many anchors, evenly spread; what is always kept stays."""
        count = min(len(self.anchors), most)
        anchors = tuple(self.anchors[number * len(self.anchors) // count] for number in range(count))
        return replace(self, anchors=anchors)

    def on(self, device: torch.device) -> "Places":
        """The same as tensors."""
        found = self._tensors.get(device)
        if found is None:
            found = self._tensors[device] = Places(self, device)
        return found

    @functools.cached_property
    def _tensors(self) -> dict[torch.device, "Places"]:
        return {}


class Places:
    """Blocks as tensors on a device."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device)

        def rows(starts: Sequence[int], ends: Sequence[int]) -> Tensor:
            steps = torch.arange(blocks.size, device=device)
            return torch.minimum(integers(starts)[:, None] + steps, integers(ends)[:, None] - 1)

        count, anchors = len(blocks.starts), blocks.anchors
        sizes = [end - start for start, end in zip(blocks.starts, blocks.ends, strict=True)]
        self.tokens = rows(blocks.starts, blocks.ends)
        """i64 [blocks, size]: rows of the stream; a short block repeats its last one."""
        self.block_of = torch.arange(count, device=device).repeat_interleave(integers(sizes), output_size=sum(sizes))
        """i64 [T]"""
        self.sequence = integers(blocks.sequence)
        """i64 [blocks]"""
        self.free = integers([block not in blocks.always for block in range(count)]).bool()
        """bool [blocks]: those that may be left out."""
        ranked = (range(first, first + kept) for first, kept in zip(blocks.firsts, blocks.kept, strict=False))
        self.best = integers([place for places in ranked for place in places])
        """i64 [kept blocks]: places among blocks that are sorted by sequence, the best first."""
        ends = [0]
        for block in anchors:
            ends.append(ends[-1] + sizes[block])
        asking = [range(blocks.starts[block], blocks.ends[block]) for block in anchors]
        self.anchor_tokens = integers([token for tokens in asking for token in tokens])
        """i64 [A]: rows of the stream that are in anchors."""
        self.anchor_rows = rows(ends[:-1], ends[1:])
        """i64 [anchors, size]: as `tokens`, among `anchor_tokens`."""
        number, asks = torch.arange(count, device=device), integers(anchors)[:, None]
        same = self.sequence == self.sequence[asks]
        self.open = same & (number < asks) & self.free
        """bool [anchors, blocks]: which block may matter to which anchor, and may be left out."""
