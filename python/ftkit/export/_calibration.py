"""What counts when weights are rounded: the importance of each matrix's columns, measured on texts.

An error in a column changes the output by as much as what goes in there: E ‖(W − Ŵ) x‖² = Σ (w − ŵ)² E x², were the
inputs uncorrelated. So importance = E x², over all tokens of a dataset, under the live model with its adapter.

Source: llama.cpp's importance matrix (K. Iwan, pull request 4861, 2024), without its further weight √(σ² + w²).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ftkit import data
from ftkit.config import DataConfig
from ftkit.models import LoadedModel
from ftkit.nn.batch import NO_ADAPTER, RaggedBatch
from ftkit.nn.calibration import input_statistics

_FEW_TOKENS = 4096
_MOST_TOKENS = 65_536
_REPORT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The importance of columns, and what it was measured on."""

    data: str
    """The dataset's name."""
    rows: int
    """Packed rows that were read."""
    tokens: int
    importance: Mapping[str, Tensor]
    """Published name of a linear layer → float32 [in]."""

    def remarks(self) -> list[str]:
        """What should be known about it."""
        if self.tokens >= _FEW_TOKENS:
            return []
        return [
            f"{self.data} has {self.tokens:,} tokens to calibrate on, less than {_FEW_TOKENS:,}: "
            "columns that matter in other texts may count for little"
        ]


def calibrate(loaded: LoadedModel, adapter_id: int | None, path: str, report: Callable[[str], None]) -> Calibration:
    """Reads rows of any layout that can be trained on; every token of them counts, up to `_MOST_TOKENS`.

    Raises InputError for data that cannot be used.
    """
    config = DataConfig(path=path, train_on="all", long_rows="split")
    dataset, _ = data.prepare(config, loaded.tokenizer, loaded.template, seed=0, pairs=None)
    total, rows = min(dataset.rows.tokens, _MOST_TOKENS), 0
    adapter = NO_ADAPTER if adapter_id is None else adapter_id
    shown = time.monotonic()

    def batches() -> Iterator[RaggedBatch]:
        nonlocal rows
        tokens = 0
        for batch in dataset.batches(1, passes=1):
            if tokens >= total:
                return
            tokens, rows = tokens + len(batch.tokens), rows + 1
            yield batch.with_adapter(adapter).to(loaded.model.device)

    def progress(tokens: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _REPORT_SECONDS:
            shown = time.monotonic()
            report(f"calibrating: {tokens:,} of {total:,} tokens")

    report(f"calibrating on {total:,} of {dataset.rows.tokens:,} tokens")
    statistics = input_statistics(loaded.model, batches(), progress)
    return Calibration(
        data=Path(path).name,
        rows=rows,
        tokens=max(each.tokens for each in statistics.values()),
        importance={name: each.second_moment.float().cpu() for name, each in statistics.items()},
    )
