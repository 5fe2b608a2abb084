"""The ragged batch: a flat stream of tokens, cut into sequences, and who adapts which of them.

There is no batch dimension and no padding. Training rows, requests that are being served and the texts of an
evaluation are the same thing: N sequences of any lengths, one after another, in T tokens.

What decides shapes is also known to the host (`lengths`, `routes`, `trained`), so that a forward pass never waits for
a device and runs on fake tensors. `RaggedBatch.pack` keeps it from the start; for a batch made of tensors it is read
from them once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from ftkit.nn.routes import Routes

UNTRAINED = -100
"""The target of a position that is not trained on."""
NO_ADAPTER = -1
"""The adapter id of a sequence that the base model answers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RaggedBatch:
    """T tokens in N sequences."""

    tokens: Tensor
    """i32 [T]"""
    positions: Tensor
    """i32 [T]: of each token in its sequence, from 0; in a continued sequence from its length so far."""
    cu_seqlens: Tensor
    """i32 [N + 1]: where each sequence begins in the stream, and T."""
    adapter: Tensor
    """i32 [N]: the adapter of each sequence, −1 for none."""
    targets: Tensor | None = None
    """i32 [T]: the token that the position must predict (already shifted), −100 where it is not trained on."""
    weights: Tensor | None = None
    """f32 [T]: of each position's loss; 1 when not given."""
    task: Tensor | None = None
    """i32 [N]: the task of each sequence, for losses that are balanced between tasks; 0 when not given."""
    group: Tensor | None = None
    """i32 [N]: sequences of one number belong together: a pair, the samples of one prompt."""
    block_table: Tensor | None = None
    """i32 [N, blocks]: the cache pages of each sequence, when serving."""
    host_lengths: tuple[int, ...] | None = field(default=None, repr=False)
    """Known lengths, when the maker has them on the host."""
    host_adapter: tuple[int, ...] | None = field(default=None, repr=False)
    """Known adapter ids, when the maker has them on the host."""
    host_group: tuple[int, ...] | None = field(default=None, repr=False)
    """Known groups, when the maker has them on the host."""
    host_trained: tuple[int, ...] | None = field(default=None, repr=False)
    """Known positions in the stream that are trained on, when the maker has them on the host."""
    shared: tuple[int, ...] = ()
    """Of each sequence, the tokens that it has in common with the last one before it that shares nothing: it begins
    with that one's first `shared` tokens, which stand in the stream once. Empty: no sequence shares any."""

    @classmethod
    def pack(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        targets: Sequence[Sequence[int]] | None = None,
        weights: Sequence[Sequence[float]] | None = None,
        adapter: int | Sequence[int] = NO_ADAPTER,
        starts: Sequence[int] | None = None,
        task: Sequence[int] | None = None,
        group: Sequence[int] | None = None,
        shared: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> Self:
        """A batch of lists of token ids, one list a sequence.

        `targets` and `weights` are laid out like the sequences; `starts` are the lengths that sequences already have
        in a cache; `adapter` is one id for all sequences or one each. With `shared`, a sequence's list has what comes
        after the tokens that it shares.
        """
        lengths = tuple(len(sequence) for sequence in sequences)
        adapters = (adapter,) * len(lengths) if isinstance(adapter, int) else tuple(adapter)
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        begins = starts or shared or [0] * len(lengths)
        positions = [begin + i for begin, length in zip(begins, lengths, strict=True) for i in range(length)]
        flat_targets = None if targets is None else [target for row in targets for target in row]
        flat_weights = None if weights is None else [weight for row in weights for weight in row]
        for name, size in (("targets", flat_targets), ("weights", flat_weights)):
            if size is not None and len(size) != offsets[-1]:
                raise ValueError(f"{name}: expected one for each of {offsets[-1]} tokens, got {len(size)}")
        if len(adapters) != len(lengths):
            raise ValueError(f"adapter: expected one for each of {len(lengths)} sequences, got {len(adapters)}")

        def integers(values: Sequence[int] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.int32).to(device)

        return cls(
            tokens=torch.tensor([t for row in sequences for t in row], dtype=torch.int32).to(device),
            positions=torch.tensor(positions, dtype=torch.int32).to(device),
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32).to(device),
            adapter=torch.tensor(adapters, dtype=torch.int32).to(device),
            targets=integers(flat_targets),
            weights=None if flat_weights is None else torch.tensor(flat_weights, dtype=torch.float32).to(device),
            task=integers(task),
            group=integers(group),
            host_lengths=lengths,
            host_adapter=adapters,
            shared=tuple(shared),
            host_group=None if group is None else tuple(group),
            host_trained=None
            if flat_targets is None
            else tuple(i for i, target in enumerate(flat_targets) if target != UNTRAINED),
        )

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """The sequences' lengths, on the host."""
        return self.host_lengths if self.host_lengths is not None else tuple(self.cu_seqlens.diff().tolist())

    @functools.cached_property
    def adapters(self) -> tuple[int, ...]:
        """The sequences' adapter ids, on the host."""
        return self.host_adapter if self.host_adapter is not None else tuple(self.adapter.tolist())

    @functools.cached_property
    def groups(self) -> tuple[int, ...]:
        """The sequences' groups, on the host; each one its own when none are given."""
        if self.group is None:
            return tuple(range(len(self.lengths)))
        return self.host_group if self.host_group is not None else tuple(self.group.tolist())

    @functools.cached_property
    def routes(self) -> Routes:
        """Which tokens of the stream go to which adapter."""
        return Routes.of_sequences(self.lengths, self.adapters)

    @functools.cached_property
    def trained(self) -> Tensor:
        """i64 [K]: the positions in the stream that are trained on, in order. Needs targets."""
        if self.host_trained is not None:
            return torch.tensor(self.host_trained, dtype=torch.int64).to(self.tokens.device)
        if self.targets is None:
            raise ValueError("expected a batch with targets, got one without")
        return (self.targets != UNTRAINED).nonzero().squeeze(1)

    @functools.cached_property
    def sequence(self) -> Tensor:
        """i64 [T]: the sequence that each token belongs to."""
        counts = torch.tensor(self.lengths, dtype=torch.int64)
        numbers = torch.arange(len(self.lengths))
        return numbers.repeat_interleave(counts, output_size=sum(self.lengths)).to(self.tokens.device)

    @functools.cached_property
    def last(self) -> Tensor:
        """i64 [N]: the place of each sequence's last token in the stream."""
        return self.cu_seqlens[1:].long() - 1

    def with_adapter(self, adapter: int) -> Self:
        """The same sequences, all under one adapter (−1: the base model)."""
        return replace(
            self, adapter=torch.full_like(self.adapter, adapter), host_adapter=(adapter,) * len(self.lengths)
        )

    def cut(self, parts: int) -> list[Self]:
        """The batch in at most `parts` batches of whole groups, of about as many tokens each."""
        found = cuts(self.lengths, self.groups, parts)
        return [self] if len(found) < 2 else [self._between(first, last) for first, last in found]

    def _between(self, first: int, last: int) -> Self:
        """The sequences from `first` to before `last`."""
        start, end = sum(self.lengths[:first]), sum(self.lengths[:last])

        changed: dict[str, Any] = {
            "cu_seqlens": self.cu_seqlens[first : last + 1] - start,
            "host_lengths": self.lengths[first:last],
            "shared": self.shared[first:last],
            "host_trained": None
            if self.host_trained is None
            else tuple(place - start for place in self.host_trained if start <= place < end),
        }
        for name in ("tokens", "positions", "targets", "weights"):
            changed[name] = None if (value := getattr(self, name)) is None else value[start:end]
        for name in ("adapter", "task", "group", "block_table", "host_adapter", "host_group"):
            changed[name] = None if (value := getattr(self, name)) is None else value[first:last]
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in moved.items()}
        return type(self)(**moved)


def cuts(lengths: Sequence[int], groups: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Where to cut sequences of these lengths into at most `parts` runs of about as many tokens, groups left whole:
    (first, past the last) of each. Sequences of one group that do not follow one another hold what is between them."""
    last_of = {group: index for index, group in enumerate(groups)}
    found: list[tuple[int, int]] = []
    start, tokens, share, reach = 0, 0, sum(lengths) / parts, 0
    for index, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        tokens += length
        reach = max(reach, last_of[group])
        if reach == index and (tokens >= share * (len(found) + 1) or index == len(lengths) - 1):
            found.append((start, index + 1))
            start = index + 1
    return found
