"""Rows of pairs hold a prompt once, and nothing else changes: tokens, targets, positions."""

import json
from pathlib import Path
from typing import Any

import pytest

from ftkit import data, models
from ftkit.config import DataConfig

pytestmark = pytest.mark.unit


def test_rows_of_pairs_have_what_they_share_once(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {n}, which goes on for a while?", "chosen": f"Good {n}.", "rejected": answer}
        for n, answer in enumerate(["Bad.", "Goo", "Good 2. Not.", "G", ""])
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "tokenizer": models.tokenizer_of(tiny_model),
        "template": models.template_of(tiny_model),
    }
    config = DataConfig(path=str(path), max_tokens=256)
    apart, together = (data.prepare(config, seed=0, pairs=True, share=share, **settings)[0] for share in (False, True))
    assert together.rows.tokens < 0.75 * apart.rows.tokens
    assert together.rows.fill > 0

    def pairs(dataset: data.Dataset) -> list[tuple[Any, ...]]:
        """Tokens, targets and positions of each sequence, with what it shares."""
        found: list[tuple[Any, ...]] = []
        for batch in dataset.batches(1, passes=1):
            parts = [x.split(batch.lengths) for x in (batch.tokens, batch.targets, batch.positions) if x is not None]
            whole: list[list[int]] = []
            for number, shared in enumerate(batch.shared or (0,) * len(batch.lengths)):
                own = [part[number].tolist() for part in parts]
                whole = whole if shared else own
                assert own[2] == list(range(shared, shared + len(own[0])))
                before = whole[0][:shared], [-100] * shared, whole[2][:shared]
                found.append(tuple((*a, *b) for a, b in zip(before, own, strict=True)))
        return sorted(zip(found[::2], found[1::2], strict=True))

    assert pairs(together) == pairs(apart)
    everything = list(range(len(together.rows)))
    assert together.rows.trained(everything) == apart.rows.trained(list(range(len(apart.rows))))
