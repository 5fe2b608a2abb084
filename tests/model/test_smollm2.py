"""SmolLM2 answers here as in transformers, and its adapters go to peft and come back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftkit import adapters, models
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder

pytestmark = pytest.mark.model

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,",
    "Q: What is photosynthesis?\nA:",
    "La vie est belle parce que",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> models.LoadedModel:
    return models.load(smollm2)


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


class GrowingCache:
    """Keys and values of each layer, for sequences that stay in their order."""

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, *, scale: float, window: int | None
    ) -> Tensor:
        assert window is None
        parts = [part.split(batch.lengths) for part in (q, k, v)]
        before = self.kept.get(layer) or [(k[:0], v[:0])] * len(batch.lengths)
        self.kept[layer] = [
            (torch.cat((old_k, new_k)), torch.cat((old_v, new_v)))
            for (old_k, old_v), new_k, new_v in zip(before, parts[1], parts[2], strict=True)
        ]
        outputs = []
        for queries, (keys, values) in zip(parts[0], self.kept[layer], strict=True):
            new, total = len(queries), len(keys)
            mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
            output = nn.functional.scaled_dot_product_attention(
                queries.transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


def greedy(model: Decoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    cache = GrowingCache()
    answers: list[list[int]] = [[] for _ in prompts]
    batch = RaggedBatch.pack(prompts)
    with torch.no_grad():
        for step in range(count):
            hidden = model(batch, cache).index_select(0, batch.last)
            tokens = model.head(hidden).argmax(-1).tolist()
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
            starts = [len(prompt) + step for prompt in prompts]
            batch = RaggedBatch.pack([[token] for token in tokens], starts=starts)
    return answers


def test_greedy_answers_equal_transformers(loaded: models.LoadedModel, peer: Any, prompts: list[list[int]]) -> None:
    """64 tokens of 8 prompts, decoded here in one ragged batch with a cache; there, each is the likeliest after those
    before it, from one pass over the whole: so it would have decoded the same.
    """
    answers = greedy(loaded.model, prompts, NEW_TOKENS)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == NEW_TOKENS
        with torch.inference_mode():
            logits = peer(torch.tensor([prompt + answer])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_no_weight_is_read_for_the_configuration(smollm2: Path, loaded: models.LoadedModel) -> None:
    assert models.config_of(smollm2) == loaded.config


def theirs_with(peer: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(peer), folder).eval()  # peft leaves traces in what it wraps


def logits(model: Decoder, ids: list[int], adapter_id: int) -> Tensor:
    batch = RaggedBatch.pack([ids], adapter=adapter_id)
    with torch.no_grad():
        return model.head(model(batch), batch.routes)


OPTIONS: dict[str, dict[str, Any]] = {
    "all-linear": {"rank": 4},
    "rslora, some layers": {"rank": 3, "rslora": True, "target_modules": ("q_proj", "down_proj")},
    "pattern": {"target_modules": r".*layers\.[01]\.(mlp|self_attn).*", "rank_pattern": {"up_proj": 5}},
    "with embedding, tied": {"rank": 2, "modules_to_save": ("embed_tokens",)},
    "with embedding, untied": {"rank": 2, "modules_to_save": ("embed_tokens",), "ensure_weight_tying": False},
    "with head, untied": {"rank": 2, "modules_to_save": ("lm_head",), "ensure_weight_tying": False},
    "with norms": {"target_modules": ("v_proj",), "modules_to_save": ("norm", "input_layernorm")},
    "head as target": {"target_modules": ("lm_head", "o_proj"), "rank": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_adapter_from_here_works_in_peft(
    loaded: models.LoadedModel, peer: Any, prompts: list[list[int]], options: dict[str, Any], tmp_path: Path
) -> None:
    model = loaded.model
    adapters.attach(model, "lora", options, seed=1)
    try:
        _disturb(adapters.trainable(model).values())
        adapters.save(model, 0, tmp_path / "adapter")
        ids = prompts[2]
        found, base = logits(model, ids, 0), logits(model, ids, -1)
        theirs = theirs_with(peer, tmp_path / "adapter")
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        assert (found - base).abs().max() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    finally:
        adapters.detach(model, 0)


PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "rslora, patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 5},
    },
    "with embedding": {"r": 2, "target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    "with head": {"r": 2, "target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    "with both, tied": {
        "r": 2,
        "target_modules": ["up_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS.keys())
def test_an_adapter_from_peft_works_here(
    loaded: models.LoadedModel, peer: Any, prompts: list[list[int]], options: dict[str, Any], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(copy.deepcopy(peer), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    _disturb(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    ids = prompts[2]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    theirs.save_pretrained(tmp_path / "adapter")
    model = loaded.model
    adapters.load(model, tmp_path / "adapter", 0)
    try:
        torch.testing.assert_close(logits(model, ids, 0), expected, rtol=1e-4, atol=1e-3)
    finally:
        adapters.detach(model, 0)


def _disturb(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
