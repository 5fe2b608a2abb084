"""The core's sampler keeps and weighs the tokens that transformers' processors keep, and knows its bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ftkit.engine import Sampling
from ftkit.engine.decode.sample import probabilities
from ftkit.errors import FtkitError, InputError

pytestmark = pytest.mark.unit


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 200),
    st.floats(0.1, 3),
    st.integers(0, 30),
    st.floats(0.05, 1),
    st.floats(0, 0.5),
    st.floats(0.5, 2),
    st.integers(0, 2**31),
)
def test_the_distribution_is_that_of_transformers(
    size: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * 3
    prompt = torch.randint(size, (3,), generator=generator).tolist()
    generated = torch.randint(size, (2,), generator=generator).tolist()
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(torch.tensor([prompt + generated]), logits[None].double())[0].softmax(-1)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    found = probabilities(logits, sampling, prompt=prompt, generated=generated)
    # A token exactly at a bound may fall on either side.
    differing = {int(i) for i in expected.nonzero()} ^ set(found)
    assert len(differing) <= 1
    if not differing:
        for token, probability in found.items():
            assert math.isclose(probability, float(expected[token]), rel_tol=1e-4)


def test_presence_frequency_and_bias() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4])
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: -1.5})
    expected = (logits - torch.tensor([0.0, 0.75, 1.0, 1.5])).softmax(-1)
    found = probabilities(logits, sampling, prompt=[0], generated=[1, 2, 2])
    assert [found[i] for i in range(4)] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"presence_penalty": 3.0},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"top_k": -1},
        {"stop": ("x",) * 17},
        {"stop": ("x" * 1025,)},
        {"logprobs": 21},
        {"logit_bias": {9: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {0: float("inf")}},
    ],
)
def test_bounds(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected"):
        probabilities(torch.zeros(5), Sampling(**wrong))  # type: ignore[arg-type]


def test_logits_that_are_no_numbers() -> None:
    with pytest.raises(FtkitError, match="not finite"):
        probabilities(torch.tensor([0.0, float("nan")]), Sampling())
