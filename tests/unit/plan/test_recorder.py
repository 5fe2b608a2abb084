"""A trace on fake tensors is the trace on real ones, and its peak is linear in depth."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftkit.plan.recorder import Peak, Recorder

pytestmark = pytest.mark.unit


def two_steps(layers: int, *, fake: bool) -> Peak:
    """Two training steps of a small transformer, recorded."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        recorder = Recorder()
        with recorder:
            with recorder.category("base weights"):
                blocks = [nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0) for _ in range(layers)]
                model = nn.Sequential(nn.Embedding(101, 32), *blocks, nn.Linear(32, 101))
            optimizer = torch.optim.AdamW(model.parameters())
            for _ in range(2):
                with recorder.category("data"):
                    tokens = torch.randint(0, 101, (3, 11))
                with recorder.category("activations"):
                    logits = model(tokens)
                with recorder.category("loss"):
                    loss = nn.functional.cross_entropy(logits.view(-1, 101), tokens.view(-1))
                del logits
                with recorder.category("activations"):
                    loss.backward()
                recorder.adopt((parameter.grad for parameter in model.parameters()), "gradients")
                with recorder.category("optimizer"):
                    optimizer.step()
                optimizer.zero_grad()
                del loss
        return recorder.peak()


def test_fake_equals_real() -> None:
    assert two_steps(2, fake=True) == two_steps(2, fake=False)


def test_two_and_three_layers_tell_any_depth() -> None:
    two, three = two_steps(2, fake=True).bytes, two_steps(3, fake=True).bytes
    assert two_steps(7, fake=True).bytes == two + 5 * (three - two)


def test_the_weights_and_the_optimizer_are_counted_exactly() -> None:
    peak = two_steps(2, fake=True)
    layer = (96 * 32 + 96) + (32 * 32 + 32) + (48 * 32 + 48) + (32 * 48 + 32) + 4 * 32
    weights = 4 * (101 * 32 + 2 * layer + 101 * 32 + 101)
    assert peak.by_category["base weights"] == weights
    assert peak.by_category["optimizer"] >= 2 * weights


def test_a_storage_is_counted_once_whatever_views_it() -> None:
    recorder = Recorder()
    with recorder, recorder.category("data"):
        base = torch.zeros(10, dtype=torch.float64)
        views = [base[1:], base.view(2, 5), base.t()]
    assert recorder.peak().bytes == 80
    del base
    assert recorder.peak().left_bytes == 80
    del views
    assert recorder.peak().left_bytes == 0


def test_adopted_tensors_move_to_their_category() -> None:
    recorder = Recorder()
    before = torch.ones(4)
    with recorder:
        made = torch.ones(3)
    recorder.adopt([made, None, before], "gradients")
    assert recorder.peak().by_category == {"gradients": 28}
