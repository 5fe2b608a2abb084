"""Every block format: its values are those of the `gguf` package, to the bit."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ftkit._core import GgufFile

pytestmark = pytest.mark.contract

# where the half-precision numbers stand in a block; all other bytes may be anything
HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    "iq4_nl": [0],
    "iq4_xs": [0],
    "f16": [0],
    "bf16": [],
    "f32": [],
}
# 13 × 97 rows of 7 K-blocks cross the tasks of the thread pool in the middle of rows
ROWS, SUPER_BLOCKS = 97, 7


def random_blocks(kind: str, generator: np.random.Generator) -> np.ndarray:
    """[ROWS, bytes]: random codes under random finite scales, denormal and zero ones among them."""
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    columns = SUPER_BLOCKS * 256 // size
    if kind in ("f32", "bf16"):
        values = (
            generator.standard_normal((ROWS, columns)) * 10.0 ** generator.integers(-30, 30, (ROWS, columns))
        ).astype(np.float32)
        return np.ascontiguousarray(
            values.view(np.uint8).reshape(ROWS, columns, 4)[..., 4 - nbytes :].reshape(ROWS, -1)
        )
    blocks = generator.integers(0, 256, (ROWS, columns, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = generator.standard_normal((ROWS, columns)) * 10.0 ** generator.integers(-8, 3, (ROWS, columns))
        scale[generator.random((ROWS, columns)) < 0.02] = 0
        blocks[..., at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(ROWS, columns * nbytes)


@pytest.mark.parametrize("kind", HALVES)
def test_values_equal_the_gguf_package_to_the_bit(kind: str, tmp_path: Path) -> None:
    blocks = random_blocks(kind, np.random.default_rng(7))
    number = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    writer.add_tensor("weights", blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.quants.dequantize(blocks, number)

    file = GgufFile(tmp_path / "blocks.gguf")
    assert file.tensors == [("weights", (ROWS, SUPER_BLOCKS * 256), kind)]
    ours = torch.empty(ROWS, SUPER_BLOCKS * 256)
    file.read("weights", ours)
    assert np.array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32))
    raw = torch.empty(blocks.size, dtype=torch.uint8)
    file.read_blocks("weights", raw)
    assert np.array_equal(raw.numpy(), blocks.ravel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reading_into_half_precision_rounds_as_torch_does(smollm2: Path, dtype: torch.dtype) -> None:
    file = GgufFile(smollm2)
    name, shape, _ = next(entry for entry in file.tensors if entry[2] == "q4_1")
    exact, rounded = torch.empty(shape), torch.empty(shape, dtype=dtype)
    file.read(name, exact)
    file.read(name, rounded)
    assert torch.equal(rounded, exact.to(dtype))
