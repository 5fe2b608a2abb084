"""`/v1/embeddings` by the official client, against transformers' hidden states of the same files."""

import base64
import concurrent.futures
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
import transformers
from managing import adapter
from serving import start, stop
from speakers import speaker

pytestmark = pytest.mark.server

NO_END = {"ignore_eos": True}
TEXTS = ["Ulm", "a longer text, é, of many bytes " * 30, "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaker(tmp_path_factory.mktemp("embeddings") / "speaker", "qwen2_5")


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(folder, tmp_path_factory.mktemp("tuned") / "tuned", 3)


@pytest.fixture(scope="module")
def speaking(folder: Path, tuned: Path) -> Iterator[openai.OpenAI]:
    server = start(str(folder), "--port=0", f"--adapter=tuned={tuned}")
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)
    assert stop(server) == 0


@pytest.fixture(scope="module")
def expected(folder: Path, tuned: Path) -> dict[str, list[torch.Tensor]]:
    """The mean of transformers' last hidden states, which are those after the final norm, of length 1; with and without
    the adapter, which is peft's to put on."""
    causal: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = {"speaker": _means(causal.model, folder)}
    adapted: Any = peft.PeftModel.from_pretrained(causal, str(tuned)).double()
    return found | {"tuned": _means(adapted.get_base_model().model, folder)}


def _means(model: Any, folder: Path) -> list[torch.Tensor]:
    read: Any = transformers.PreTrainedTokenizerFast
    tokenizer = read(tokenizer_file=str(folder / "tokenizer.json"))
    found = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.inference_mode():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        found.append((mean / mean.norm()).float())
    return found


@pytest.mark.parametrize("name", ["speaker", "tuned"])
def test_they_are_those_of_transformers(
    speaking: openai.OpenAI, expected: dict[str, list[torch.Tensor]], name: str
) -> None:
    answer = speaking.embeddings.create(model=name, input=TEXTS)  # base64, unless told otherwise
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.model == name
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(text.encode()) for text in TEXTS)
    for entry, mean in zip(answer.data, expected[name], strict=True):
        torch.testing.assert_close(torch.tensor(entry.embedding), mean, atol=2e-6, rtol=1e-5)
    (other,) = expected.keys() - {name}
    for wrong in (expected[name][1], expected[other][0]):
        assert (torch.tensor(answer.data[0].embedding) - wrong).abs().max() > 0.01


def test_formats_and_tokens_are_the_same(speaking: openai.OpenAI) -> None:
    floats = speaking.embeddings.create(model="speaker", input="Ulm", encoding_format="float").data[0].embedding
    coded: Any = speaking.embeddings.create(model="speaker", input="Ulm", encoding_format="base64").data[0].embedding
    if isinstance(coded, str):
        coded = list(struct.unpack(f"<{len(floats)}f", base64.b64decode(coded)))
    assert coded == floats
    letters = speaking.embeddings.create(model="speaker", input=[[1, 2], [1, 2], [2, 1]], encoding_format="float").data
    assert letters[0].embedding == letters[1].embedding != letters[2].embedding
    assert speaking.embeddings.create(model="speaker", input=[1, 2]).data[0].embedding == letters[0].embedding


def test_long_texts_in_chunks_among_others_are_the_same_to_the_bit(speaking: openai.OpenAI) -> None:
    """Each takes several steps, and what a step has left for it depends on the others."""

    def embed(pair: tuple[str, str]) -> list[float]:
        name, text = pair
        return speaking.embeddings.create(model=name, input=text, encoding_format="float").data[0].embedding

    texts = [f"{number} is a long text. " * 80 for number in ("one", "twenty-two", "three")]
    pairs = [(name, text) for text in texts for name in ("speaker", "tuned")]
    alone = [embed(pair) for pair in pairs]
    answer = speaking.completions.create(model="tuned", prompt="x", max_tokens=500, stream=True, extra_body=NO_END)
    with concurrent.futures.ThreadPoolExecutor(len(pairs)) as callers:
        assert list(callers.map(embed, pairs)) == alone
    answer.close()
    assert len({str(vector) for vector in alone}) == len(pairs)


def test_fewer_dimensions_are_the_first_ones_of_length_1(speaking: openai.OpenAI) -> None:
    whole = torch.tensor(speaking.embeddings.create(model="speaker", input="Ulm").data[0].embedding)
    cut = torch.tensor(speaking.embeddings.create(model="speaker", input="Ulm", dimensions=7).data[0].embedding)
    torch.testing.assert_close(cut, whole[:7] / whole[:7].norm(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "prompt"),
        ({"input": [1.5]}, "input"),
        ({"input": [99999]}, "prompt"),
        ({"input": "x" * 5000}, "prompt"),
        ({"dimensions": 33}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
    ],
)
def test_errors(speaking: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        speaking.embeddings.create(**{"model": "speaker", "input": "x", **fields})
    body: Any = caught.value.body
    assert body["param"] == param
    assert "expected" in body["message"]
