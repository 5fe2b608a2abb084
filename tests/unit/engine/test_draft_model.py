"""A smaller model that makes drafts: the same tokens for every seed, the model's own distribution, fewer steps."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, SHAPE, saved
from ftkit import adapters, models
from ftkit.engine import Engine, Sampling
from ftkit.errors import InputError
from ftkit.models import LoadedModel

pytestmark = pytest.mark.unit

PROMPTS = ["What is it?", "abcabc", "x"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel, Any]:
    """A model, another that is almost the same, and transformers' version of the first."""
    folder = tmp_path_factory.mktemp("pair")
    _, theirs = saved(folder / "large", "llama")
    large, small = models.load(folder / "large"), models.load(folder / "large")
    generator = torch.Generator().manual_seed(3)
    for layer in small.model.layers:
        weight = layer.mlp.down_proj.weight.dense().clone()
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
        layer.mlp.down_proj.weight.replace_dense(weight)
    return large, small, theirs


def _answers(
    loaded: LoadedModel, samplings: list[Sampling], names: list[str | None], folder: Path, **options: Any
) -> tuple[Any, dict[str, int]]:
    with Engine(loaded, pool_bytes=8 << 20, block_tokens=4, **options) as engine:
        if any(names):
            engine.add_adapter("mine", folder)
        prompts = list(itertools.islice(itertools.cycle(PROMPTS), len(samplings)))
        return engine.generate_many(prompts, samplings, model=names), engine.metrics


def test_the_same_tokens_as_without_in_any_company(pair: tuple[LoadedModel, LoadedModel, Any], tmp_path: Path) -> None:
    large, small, _ = pair
    adapters.attach(large.model, "lora", {"rank": 4, "target_modules": ("q_proj", "o_proj")}, seed=0, adapter_id=90)
    with torch.no_grad():
        for parameter in adapters.trainable(large.model, 90).values():
            parameter.add_(0.1)
    adapters.save(large.model, 90, tmp_path / "mine")
    adapters.detach(large.model, 90)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"top_p": 0.8},
        {"presence_penalty": 1.0},
    ]
    how = [
        Sampling(max_tokens=20, seed=seed, logprobs=2, ignore_end=True, **kind) for seed, kind in enumerate(3 * kinds)
    ]
    names: list[str | None] = [None] * 4 + ["mine"] * 4 + [None] * 4
    plain, _ = _answers(large, how, names, tmp_path / "mine")
    drafted, counted = _answers(large, how, names, tmp_path / "mine", draft=small)
    assert [answer.logprobs for answer in drafted] == [answer.logprobs for answer in plain]
    assert [answer.text for answer in drafted] == [answer.text for answer in plain]
    assert 20 < counted["accepted_tokens_total"] < counted["drafted_tokens_total"]


def test_a_model_is_its_own_best_draft(pair: tuple[LoadedModel, LoadedModel, Any], tmp_path: Path) -> None:
    large = pair[0]
    how = [Sampling(temperature=1.0, max_tokens=21, seed=seed, ignore_end=True) for seed in range(6)]
    _, counted = _answers(large, how, [None] * 6, tmp_path, draft=models.load(large.path), draft_tokens=3)
    # each row by itself to the bit: nothing that was found or shared among pages led the draft astray
    assert counted["accepted_tokens_total"] == counted["drafted_tokens_total"] >= 60


def test_drafted_tokens_follow_the_models_distribution(
    pair: tuple[LoadedModel, LoadedModel, Any],
) -> None:
    large, small, theirs = pair
    count, kept = 800, 3
    how = [
        Sampling(temperature=1.0, top_k=kept, max_tokens=3, seed=seed, ignore_end=True, logprobs=0)
        for seed in range(count)
    ]
    # few at a time: a step with many rows makes no drafts
    with Engine(large, pool_bytes=8 << 20, draft=small, draft_tokens=2, max_sequences=8) as engine:
        prompt = engine.encode(PROMPTS[0])
        answers = engine.generate_many([prompt] * count, how)
        counted = engine.metrics
    assert counted["accepted_tokens_total"] > count // 3
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        grown = {}
        for tokens, share in expected.items():
            with torch.no_grad():
                logits = theirs(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
            top = logits.topk(kept)
            for token, chance in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
                grown[*tokens, token] = share * chance
        expected = grown
    seen = {tokens: 0 for tokens in expected}
    for answer in answers:
        assert answer.logprobs is not None
        seen[tuple(token.id for token in answer.logprobs)] += 1
    likely = [tokens for tokens, chance in expected.items() if chance * count >= 5]
    square = sum((seen[t] - expected[t] * count) ** 2 / (expected[t] * count) for t in likely)
    # 27 answers at most: the 0.999 quantile of χ² with 26 degrees of freedom
    assert len(likely) > 12
    assert square < 54.05


def test_a_model_with_other_tokens_is_refused(pair: tuple[LoadedModel, LoadedModel, Any], tmp_path: Path) -> None:
    large = pair[0]
    build, config = FAMILIES["llama"]
    build(type(config)(**SHAPE | {"vocab_size": 101})).save_pretrained(tmp_path / "more")
    with pytest.raises(InputError, match="draft: expected a model with a vocabulary of 97 tokens, got more with 101"):
        Engine(large, draft=models.load(tmp_path / "more"))
    saved(tmp_path / "other", "llama")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"A"', '"é"'))
    with pytest.raises(InputError, match="draft: expected the model's own tokens, got 'é' for token"):
        Engine(large, draft=models.load(tmp_path / "other"))
    build(type(config)(**SHAPE | {"max_position_embeddings": 64})).save_pretrained(tmp_path / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "short" / name).write_bytes((large.path / name).read_bytes())
    with pytest.raises(InputError, match="draft: expected a model for 128 tokens, got short for 64"):
        Engine(large, draft=models.load(tmp_path / "short"))
