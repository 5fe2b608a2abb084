"""The format of each weight: llama.cpp's rules, as files made by it show them."""

from pathlib import Path

import pytest

from ftkit._core import GgufFile
from ftkit.errors import InputError
from ftkit.export._gguf_types import TYPES, block_format, mixture

pytestmark = pytest.mark.unit


def test_the_real_files_formats_are_those_of_its_type(smollm2: Path) -> None:
    file = GgufFile(smollm2)
    for name, shape, kind in file.tensors:
        assert block_format(name, shape, 30, TYPES["q4_1"]) == kind, name
    assert file.metadata["general.file_type"] == TYPES["q4_1"].file_type


def test_vectors_stay_in_single_precision() -> None:
    assert {block_format("blk.0.attn_norm.weight", (4096,), 32, each) for each in TYPES.values()} == {"f32"}


def test_the_medium_mixture_raises_half_of_two_parts() -> None:
    def formats(part: str) -> list[str]:
        return [block_format(f"blk.{layer}.{part}.weight", (512, 4096), 32, TYPES["q4_k_m"]) for layer in range(32)]

    assert set(formats("attn_q")) == {"q4_k"}
    assert formats("attn_v") == formats("ffn_down")
    assert formats("ffn_down").count("q6_k") == 16
    assert formats("ffn_down")[:4] == ["q6_k"] * 4
    assert formats("ffn_down")[-4:] == ["q6_k"] * 4
    assert block_format("output.weight", (512, 4096), 32, TYPES["q4_k_m"]) == "q6_k"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("columns", [4096, 576, 577])
def test_every_row_divides_into_the_blocks_of_its_format(name: str, columns: int) -> None:
    for tensor in ("token_embd.weight", "blk.3.attn_v.weight", "blk.3.ffn_up.weight"):
        kind = block_format(tensor, (7, columns), 8, TYPES[name])
        divides = {"f32": 1, "f16": 1, "bf16": 1}.get(kind, 256 if kind.endswith(("_k", "_xs")) else 32)
        assert columns % divides == 0
        assert columns != 577 or kind in ("f16", "f32", "bf16")


def test_an_unknown_type_has_a_neighbour() -> None:
    with pytest.raises(InputError, match="got 'q4_km'\nhint: did you mean 'q4_k_m'"):
        mixture("q4_km")
