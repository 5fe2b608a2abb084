"""Which rows of a stream go to which adapter, known on the host."""

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """Spans of rows, each under one adapter: `spans` holds (adapter, first row, row after the last), in order."""

    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of_sequences(cls, lengths: Sequence[int], adapters: Sequence[int]) -> Self:
        """The routes of sequences one after another; neighbours under one adapter become one span."""
        spans: list[tuple[int, int, int]] = []
        end = 0
        for length, adapter in zip(lengths, adapters, strict=True):
            begin, end = end, end + length
            if not length:
                continue
            if spans and spans[-1][0] == adapter:
                spans[-1] = (adapter, spans[-1][1], end)
            else:
                spans.append((adapter, begin, end))
        return cls(tuple(spans))

    @classmethod
    def of_rows(cls, adapters: Sequence[int]) -> Self:
        """The routes of single rows, one adapter id each."""
        return cls.of_sequences([1] * len(adapters), adapters)

    def take(self, rows: Sequence[int]) -> "Routes":
        """The routes of a stream made of these rows of this one."""
        if self.single is not None:
            return Routes(((self.single, 0, len(rows)),))
        ends = [end for _, _, end in self.spans]
        return Routes.of_rows([self.spans[bisect.bisect_right(ends, row)][0] for row in rows])

    @functools.cached_property
    def single(self) -> int | None:
        """The adapter of all rows, or None where they differ."""
        adapters = {adapter for adapter, _, _ in self.spans}
        return adapters.pop() if len(adapters) == 1 else None

    @functools.cached_property
    def parts(self) -> tuple[tuple[int, slice | Tensor], ...]:
        """(adapter, its rows: a slice, or i64 indices on the CPU where they are scattered), by adapter id."""
        found: list[tuple[int, slice | Tensor]] = []
        for adapter, group in itertools.groupby(sorted(self.spans), key=lambda span: span[0]):
            spans = [(begin, end) for _, begin, end in group]
            if len(spans) == 1:
                found.append((adapter, slice(*spans[0])))
            else:
                found.append((adapter, torch.cat([torch.arange(begin, end) for begin, end in spans])))
        return tuple(found)

    @functools.cached_property
    def back(self) -> Tensor:
        """i64 [rows], on the CPU: where each row of the stream stands when the parts are put one after another."""
        count = self.spans[-1][2] if self.spans else 0
        rows = torch.arange(count)
        order = torch.cat([rows[part] for _, part in self.parts]) if self.parts else rows
        back = torch.empty_like(order)
        back[order] = rows
        return back
