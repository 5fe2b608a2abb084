"""Exported files in llama.cpp: the same tokens in, and answers that agree with ours.

llama.cpp rounds activations to 8 bits where weights are quantized, and keys and values to half precision. So a greedy
answer may part from ours; where it does, the two candidates must have been closer than that rounding moves logits,
which is measured on our model: the same weights with activations rounded in the same way.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ftkit import adapters, models
from ftkit.engine import Engine, Sampling
from ftkit.engine.llama_cpp import open_model
from ftkit.export import Material, gguf_lora
from ftkit.export import gguf as target
from ftkit.models import LoadedModel
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.linear import DenseWeight

pytestmark = [pytest.mark.llama, pytest.mark.model, pytest.mark.slow]

QUESTIONS = (
    "What is the capital of France?", "Name three primary colours.", "How many days are in a week?",
    "Write one sentence about the sea.", "What is 7 times 8?", "Translate 'good morning' to Spanish.",
    "Who wrote Romeo and Juliet?", "Give me a short definition of gravity.", "List two mammals that can fly.",
    "What does HTTP stand for?", "Why is the sky blue?", "Say hello in a friendly way.",
    "What is the boiling point of water?", "Suggest a name for a cat.", "What is photosynthesis?",
    "Write a haiku about rain.", "What is the largest planet?", "How do I boil an egg?",
    "What year did the Second World War end?", "Explain what a variable is in programming.",
)  # fmt: skip
TOKENS = 32
AGREE = {"f16": 0.95}
"""Least share of whole answers that agree; where activations are rounded, each parting is held to the rounding."""


@pytest.fixture(scope="module")
def adapted(smollm2: Path) -> LoadedModel:
    """The real model with a LoRA that changes it a little: an export that forgets it would be found out."""
    loaded = models.load(smollm2)
    adapters.attach(loaded.model, "lora", {"rank": 4}, seed=1)
    torch.manual_seed(4)
    for name, parameter in adapters.trainable(loaded.model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.004)
    return loaded


def reads(path: Path) -> Any:
    pytest.importorskip("llama_cpp")
    return open_model(path, n_ctx=512, n_threads=2, n_batch=256, logits_all=True)


@pytest.fixture(scope="module", params=["f16", "q8_0", "q4_1"])
def pair(
    request: pytest.FixtureRequest, adapted: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """(type, our model of the exported file, llama.cpp's)."""
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    target.write(Material.of(adapted, 0), path, request.param)
    theirs = reads(path)
    yield request.param, models.load(path), theirs
    theirs.close()
    path.unlink()


def test_texts_become_the_same_tokens(pair: Any) -> None:
    _, ours, theirs = pair
    for text in [
        *QUESTIONS,
        "  two  spaces\n\n\ttabs",
        "grüß 你好 🌍 naïve",
        "x = 12345 + 67.89",
        "<|im_start|>user\n",
    ]:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ours.tokenizer.encode(text), text


def test_greedy_answers_agree(pair: Any) -> None:
    kind, ours, theirs = pair
    same = total = 0
    with Engine(ours, pool_bytes=256 << 20) as engine:
        prompts = [engine.encode([{"role": "user", "content": question}]) for question in QUESTIONS]
        answers = engine.generate_many(prompts, Sampling(temperature=0.0, max_tokens=TOKENS))
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, got = answer.tokens, continued(theirs, prompt, set(ours.tokenizer.end_ids))
        agreed = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
        if agreed is None and len(expected) != len(got):
            agreed = min(len(expected), len(got))
        length = max(len(expected), len(got))
        same += length if agreed is None else agreed
        total += length
        if agreed is not None:
            pair_of_tokens = candidates(ours, expected, got, agreed)
            gaps.append(gap(ours, kind, prompt + expected[:agreed], pair_of_tokens))
    whole = len(QUESTIONS) - len(gaps)
    print(f"{kind}: {whole} of {len(QUESTIONS)} answers the same, {same} of {total} tokens before; gaps {gaps}")
    # two logits may move towards each other, each by what rounding moves one
    assert all(difference <= 2 * rounding for difference, rounding in gaps)
    assert whole / len(QUESTIONS) >= AGREE.get(kind, 0)


def test_its_rounding_of_activations_is_what_sets_it_apart(pair: Any) -> None:
    kind, ours, theirs = pair
    tokens = ours.tokenizer.encode("The river")[:1]  # later ones amplify the last bits of sums, in both
    theirs.reset()
    theirs.eval(tokens)
    got = torch.from_numpy(np.array(theirs.scores[0])).double()
    exact, rounded = (logits_of(ours, tokens, kind, rounded=rounded) for rounded in (False, True))
    far, near = (float((mine - got).abs().mean()) for mine in (exact, rounded))
    print(f"{kind}: llama.cpp is {far:.4f} from our exact logits, {near:.4f} from those with rounded activations")
    # beside Q4_1 it keeps the sums of blocks of activations in half precision, too, which rounding x doesn't show
    assert near < far * (1 if kind == "q4_1" else 0.5)


def test_logits_agree(pair: Any) -> None:
    kind, ours, theirs = pair
    tokens = ours.tokenizer.encode("The river rises in the mountains, crosses three valleys, and reaches the sea. " * 2)
    theirs.reset()
    theirs.eval(tokens)
    got = torch.from_numpy(np.array(theirs.scores[: len(tokens)])).double()
    with torch.inference_mode():
        batch = RaggedBatch.pack([tokens])
        expected = ours.model.head(ours.model(batch)).double()
    top1 = float((expected.argmax(-1) == got.argmax(-1)).double().mean())
    divergence = (expected.softmax(-1) * (expected.log_softmax(-1) - got.log_softmax(-1))).sum(-1)
    largest = (expected - got).abs().max()
    print(f"{kind}: top-1 {top1:.3f}, KL {divergence.mean():.2e}, largest difference of logits {largest:.3f}")
    assert float(divergence.mean()) < {"f16": 1e-4}.get(kind, 2e-2)
    assert top1 > 0.9


def continued(theirs: Any, prompt: list[int], ends: set[int]) -> list[int]:
    """llama.cpp's greedy answer."""
    theirs.reset()
    theirs.eval(prompt)
    found: list[int] = []
    while len(found) < TOKENS:
        token = int(np.argmax(theirs.scores[theirs.n_tokens - 1]))
        if token in ends:
            break
        found.append(token)
        theirs.eval([token])
    return found


def candidates(ours: LoadedModel, expected: list[int], got: list[int], at: int) -> tuple[int, int]:
    """What each chose where they part; an answer that ended chose an end token."""
    end = ours.tokenizer.eos_id
    assert end is not None
    return (expected[at] if at < len(expected) else end, got[at] if at < len(got) else end)


def gap(ours: LoadedModel, kind: str, tokens: list[int], pair: tuple[int, int]) -> tuple[float, float]:
    """By how much our logit of our choice exceeds that of llama.cpp's, and the most that rounding moves a logit."""
    exact, rounded = (logits_of(ours, tokens, kind, rounded=rounded) for rounded in (False, True))
    return round(float(exact[pair[0]] - exact[pair[1]]), 3), round(float((exact - rounded).abs().max()), 3)


def logits_of(ours: LoadedModel, tokens: list[int], kind: str, *, rounded: bool) -> Tensor:
    """Logits [vocabulary], float64, after `tokens`; `rounded`: with activations as llama.cpp rounds them for `kind`."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        if rounded:
            as_stored = half_precision if kind == "f16" else eight_bits
            patch.setattr(DenseWeight, "matmul", lambda self, x: functional.linear(as_stored(x), self.tensor))
        return ours.model.head(ours.model(RaggedBatch.pack([tokens]))[-1:])[0].double()


def half_precision(x: Tensor) -> Tensor:
    return x.half().float()


def eight_bits(x: Tensor) -> Tensor:
    """x in blocks of 32 whole numbers up to 127, with a scale in half precision, as llama.cpp's Q8_0 and Q8_1."""
    blocks = x.reshape(-1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    numbers = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (numbers * scale.half().float()).view(x.shape)


def test_an_adapter_file_over_the_base_answers_as_the_live_adapter(adapted: LoadedModel, tmp_path: Path) -> None:
    package = pytest.importorskip("llama_cpp")
    model, config = adapted.model, adapted.config
    gguf_lora.write(Material.of(adapted, 0), tmp_path / "lora.gguf", "f32")
    target.write(Material.of(models.load(adapted.path)), tmp_path / "base.gguf", "f16")
    tokens = adapted.tokenizer.encode("The river rises in the mountains, crosses three valleys, and reaches the sea. ")
    found: dict[str | None, Tensor] = {}
    for lora in (None, str(tmp_path / "lora.gguf")):
        whole = package.llama_cpp.GGML_TYPE_F32  # keys and values; half precision would round them
        theirs = open_model(
            tmp_path / "base.gguf", n_ctx=512, n_threads=2, logits_all=True, lora_path=lora, type_k=whole, type_v=whole
        )
        theirs.eval(tokens)
        found[lora] = torch.from_numpy(np.array(theirs.scores[: len(tokens)])).double()
        theirs.close()
    assert config.vocab_size == found[None].shape[1]
    divergence = {}
    for adapter in (0, -1):
        batch = RaggedBatch.pack([tokens], adapter=adapter)
        with torch.inference_mode():
            live = model.head(model(batch), batch.routes).double()
        divergence[adapter] = {
            lora: float((live.softmax(-1) * (live.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean())
            for lora, got in found.items()
        }
    (_, lora) = found
    print(divergence)
    # over f16 matrices llama.cpp rounds activations to half precision, which is what the bound of f16 above is for
    assert divergence[0][lora] < 1e-4
    assert divergence[0][None] > 100 * divergence[0][lora]
    assert divergence[-1][None] < 1e-4
