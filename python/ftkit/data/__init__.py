"""Datasets as packed, ragged batches (the work is done in the core).

A dataset is read, encoded and cached once; packing it into rows, holding a part out and ordering the rows of each pass
are decided by the seed alone, so that a run can be stopped and continued at any batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from ftkit import _core
from ftkit.config import DataConfig
from ftkit.config.cache import cache_directory
from ftkit.data import feedback
from ftkit.errors import InputError, did_you_mean
from ftkit.nn.batch import RaggedBatch

EXPLAINED = ("label", "rationale")
"""The tasks of rows that have both."""

__all__ = ["Dataset", "cache_directory", "encode", "prepare"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Packed rows that are trained or evaluated on."""

    rows: _core.PackedRows
    seed: int
    fingerprint: str
    """Hash of the data and of all that decides its tokens."""
    statistics: Mapping[str, int]
    """Counts of the whole dataset, held-out part included."""
    problems: tuple[str, ...]
    """What was wrong with the rows that were skipped, as far as they were read anew."""
    tasks: tuple[str, ...] = ()
    """The names of the rows' tasks, where they have some, in the order of `RaggedBatch.task`."""
    numbers: tuple[int, ...] | None = None
    """The tasks' numbers by those in the cache, where they differ."""

    def __len__(self) -> int:
        return len(self.rows)

    def with_tasks(self, names: Sequence[str]) -> Self:
        """The same rows with their tasks numbered as `names`. Raises InputError for one that is not among them."""
        for name in self.tasks:
            if name not in names:
                raise InputError(
                    f"evaluation: expected tasks that are trained on ({', '.join(names)}), got {name!r}",
                    did_you_mean(name, names),
                )
        return replace(self, tasks=tuple(names), numbers=tuple(names.index(name) for name in self.tasks))

    def batches(self, batch_rows: int, *, start: int = 0, passes: int | None = None) -> Iterator[RaggedBatch]:
        """Batches of `batch_rows` rows, pass after pass (without end when `passes` is None), from the `start`-th on."""
        return (self.batch(rows) for rows in self.portions(batch_rows, start=start, passes=passes))

    def portions(self, batch_rows: int, *, start: int = 0, passes: int | None = None) -> Iterator[list[int]]:
        """The rows of each of these batches.

        The last batch of a pass may have fewer. Which rows are in the i-th one depends on the seed only.
        """
        a_pass = -(-len(self) // batch_rows)
        number, first = divmod(start, a_pass)
        while passes is None or number < passes:
            order = self.rows.order(self.seed, number)
            for index in range(first, a_pass):
                yield order[index * batch_rows : (index + 1) * batch_rows]
            number, first = number + 1, 0

    def batch(self, rows: list[int]) -> RaggedBatch:
        """The given rows, one after the other, for the adapter 0; targets are shifted within each sequence."""
        tokens, sequences = self.rows.sizes(rows)
        ids, targets, positions = (torch.empty(tokens, dtype=torch.int32) for _ in range(3))
        cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32)
        group, task = (torch.empty(sequences, dtype=torch.int32) for _ in range(2))
        self.rows.write(rows, ids, targets, positions, cu_seqlens, group, task)
        if self.numbers is not None:
            task = torch.tensor(self.numbers, dtype=torch.int32)[task.long()]
        shared = tuple(self.rows.shared(rows))
        return RaggedBatch(
            tokens=ids,
            targets=targets,
            positions=positions,
            cu_seqlens=cu_seqlens,
            group=group,
            task=task if self.tasks or self.statistics["labelled"] or self.statistics["pairs"] else None,
            adapter=torch.zeros(sequences, dtype=torch.int32),
            host_lengths=tuple(self.rows.lengths(rows)),
            host_adapter=(0,) * sequences,
            shared=shared if any(shared) else (),
        )


def encode(
    config: DataConfig,
    tokenizer: _core.Tokenizer,
    template: _core.ChatTemplate | None,
    *,
    tasks: bool = False,
    progress: Callable[[int], None] | None = None,
) -> _core.PreparedData:
    """The data's sequences: tokens, and which of them are trained on; from the cache where they are in it already.

    `tasks`: each row names its task. `progress` is called with the number of rows read so far. Raises InputError for
    data that cannot be used.
    """
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    if not paths:
        raise InputError("data.path: expected at least one file, got none")
    for path in paths:
        if path != "-" and not Path(path).exists():
            raise InputError(f"{path}: expected a file or a directory of rows, got nothing there")
    return _core.prepare_data(
        paths,
        tokenizer,
        template,
        max_tokens=config.max_tokens,
        schema=None if config.schema == "auto" else config.schema,
        mapping=dict(config.columns),
        train_on=config.train_on,
        long_rows=config.long_rows,
        tasks=tasks,
        skip_bad_rows=config.skip_bad_rows,
        cache=str(cache_directory()),
        progress=progress,
    )


def prepare(
    config: DataConfig,
    tokenizer: _core.Tokenizer,
    template: _core.ChatTemplate | None,
    *,
    seed: int,
    split: float = 0.0,
    pairs: bool | None = False,
    labelled: bool = False,
    together: int = 1,
    explained: bool = False,
    tasks: bool = False,
    share: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """The dataset packed into rows of `config.max_tokens`, and the share `split` of it that is held out.

    Equal rows are on the same side. `pairs`: every row has a chosen and a rejected answer (True), none has (False), or
    any may have (None); `labelled`: a row may also have one answer, and say whether it is wanted. `together`: answers
    that follow one another in the files and stay in one group, so that every group has those of several rows.
    `explained`: every row is a label and a rationale; `tasks`: every row names its task. `share`: what both
    answers of a pair begin with is in the batch once. Raises InputError for data that cannot be used, or too little to
    hold any out.
    """
    config = _with_feedback(config, pairs, labelled)
    prepared = encode(config, tokenizer, template, tasks=tasks, progress=progress)
    if pairs is not None:
        _check_answers(prepared.statistics, pairs, labelled)
        _check_explained(prepared.statistics, explained)
    training, held_out = prepared.split(config.max_tokens, seed, split, together, share)
    if not len(training):
        raise InputError(
            f"evaluation.split: expected rows to train on beside those held out, got {len(prepared)} in all",
            "hold out a smaller share, or give a file of held-out rows",
        )

    for name, part in (("data", training), ("evaluation", held_out)):
        if together > 1 and part is not None and part.units < 2:
            raise InputError(
                f"{name}: expected at least 2 rows, of which one's answer is held against the other's, got {part.units}"
            )

    def dataset(rows: _core.PackedRows) -> Dataset:
        return Dataset(
            rows=rows,
            seed=seed,
            fingerprint=prepared.fingerprint,
            statistics=prepared.statistics,
            problems=tuple(prepared.problems),
            tasks=EXPLAINED if explained else tuple(prepared.tasks),
        )

    return dataset(training), None if held_out is None else dataset(held_out)


def _check_explained(counts: Mapping[str, int], explained: bool) -> None:
    """Raises InputError where rows have a label and a rationale and should not, or the other way round."""
    others = counts["rows"] - counts["bad_rows"] - counts["masked_rows"] - counts["explained"]
    if explained and others:
        raise InputError(
            f"data: expected a label and a rationale a row, got {others:,} other rows",
            "the columns are prompt, label and rationale; data.columns maps other names",
        )
    if counts["explained"] and not explained:
        raise InputError(
            f"data: expected one answer a row, got {counts['explained']:,} labels with a rationale",
            'the objective step_by_step learns from both; data.columns = { completion = "label" } takes the labels',
        )


def _with_feedback(config: DataConfig, pairs: bool | None, labelled: bool) -> DataConfig:
    """The configuration with files in place of feedback."""

    def rows(path: str) -> str:
        return feedback.rows_file(path, pairs=pairs, labelled=labelled) if feedback.is_feedback(path) else path

    path = rows(config.path) if isinstance(config.path, str) else tuple(map(rows, config.path))
    return replace(config, path=path)


def _check_answers(counts: Mapping[str, int], pairs: bool, labelled: bool) -> None:
    """Raises InputError for rows with other answers than the objective takes."""
    rows = counts["rows"] - counts["bad_rows"] - counts["masked_rows"]
    others = rows - counts["pairs"] - (counts["labelled"] if labelled else 0)
    if pairs and others:
        either = ", or an answer with its label" if labelled else ""
        columns = " or prompt, completion and label (true or false)" if labelled else ""
        raise InputError(
            f"data: expected pairs of a chosen and a rejected answer a row{either}, got {others:,} other rows",
            f"the columns are prompt, chosen and rejected{columns}; data.columns maps other names",
        )
    if counts["pairs"] and not pairs:
        raise InputError(
            f"data: expected one answer a row, got {counts['pairs']:,} pairs of a chosen and a rejected one",
            'data.columns = { completion = "chosen" } takes the chosen ones; preference objectives take pairs',
        )
    if counts["labelled"] and not labelled:
        raise InputError(
            f"data: expected answers to learn, got {counts['labelled']:,} that are labelled as wanted or not",
            'data.schema = "prompt_completion" takes them all, whatever the label; the objective kto learns from both',
        )
