"""The README's table of formats: all of them are in it, and what it says is what is computed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import _tables

from ftkit.eval import perplexity
from ftkit.models import LoadedModel

pytestmark = pytest.mark.model

# the table's last digit, and what another processor's order of sums moves: KL in nats, perplexity relative
KL, PERPLEXITY, TOP1 = 2e-4, 5e-4, 2e-3


@pytest.fixture(scope="module")
def dense() -> tuple[LoadedModel, _tables.Figures]:
    return _tables.dense()


def test_every_format_is_in_the_table() -> None:
    assert list(_tables.committed()) == _tables.formats(), "just tables"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q8_0", "q3_k_m", "nf4", "int4_group"])
def test_the_table_says_what_is_computed(name: str, dense: tuple[LoadedModel, _tables.Figures], tmp_path: Path) -> None:
    bits, _, said, kl, top1 = _tables.committed()[name]
    loaded = _tables.held_as(name, dense[0], tmp_path)
    found = _tables.quality(loaded, dense[1])
    assert found["perplexity"] == pytest.approx(said, rel=PERPLEXITY)
    assert found["kl_mean"] == pytest.approx(kl, abs=KL)
    assert found["top1"] == pytest.approx(top1, abs=TOP1)
    assert _tables.bits_per_weight(loaded) == pytest.approx(bits, abs=0.0051)


def test_the_dense_models_perplexity_is_transformers(peer: Any, dense: tuple[LoadedModel, _tables.Figures]) -> None:
    ours = perplexity.summary((logs.double(), targets) for logs, targets in dense[1])
    assert ours["perplexity"] == pytest.approx(_tables.committed()[_tables.DENSE][2], rel=PERPLEXITY)
    tokenizer = dense[0].tokenizer
    tokens = torch.tensor([*tokenizer.encode(_tables.TEXT.read_text(encoding="utf-8")), tokenizer.eos_id])
    loss, count = 0.0, 0
    for piece in tokens.split(1024):
        with torch.inference_mode():
            logs = peer(piece[None]).logits[0, :-1].log_softmax(-1)
        loss -= float(logs.gather(1, piece[1:, None]).double().sum())
        count += len(piece) - 1
    assert ours["tokens"] == count
    assert ours["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
