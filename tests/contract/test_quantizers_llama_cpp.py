"""Every quantizer against llama.cpp's own, on the weights of the real model: our error is not larger.

With an importance matrix, too, under the errors' weights that the matrix gives. (llama.cpp multiplies these with
√(σ² + x²) in most formats, and leaves them aside in Q8_0.)
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from ftkit import _core, models
from ftkit._core import GgufFile
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.calibration import input_statistics

pytestmark = [pytest.mark.llama, pytest.mark.contract]

NUMBERS = {
    "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
    "iq4_nl": 20, "iq4_xs": 23,
}  # fmt: skip
SIZES = {name: (size, nbytes) for name, size, nbytes in _core.quant_formats()}


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp")
    library = ctypes.CDLL(next(str(path) for path in (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def weights(smollm2: Path, name: str) -> torch.Tensor:
    """The real weights [out, in]."""
    file = GgufFile(smollm2)
    shape = next(shape for tensor, shape, _ in file.tensors if tensor == name)
    values = torch.empty(shape)
    file.read(name, values)
    # the real weights lie on a grid themselves: noise of a tenth of a step makes them as they were before
    generator = torch.Generator().manual_seed(1)
    return values + torch.randn(shape, generator=generator) * values.std() / 50


def share(ggml: ctypes.CDLL, kind: str, values: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    """Our squared error as a share of llama.cpp's."""
    size, nbytes = SIZES[kind]
    theirs, ours = (torch.empty(values.numel() // size * nbytes, dtype=torch.uint8) for _ in range(2))
    pointer = None if importance is None else importance.data_ptr()
    ggml.ggml_quantize_chunk(NUMBERS[kind], values.data_ptr(), theirs.data_ptr(), 0, *values.shape, pointer)
    _core.quantize(kind, values, ours, importance)
    errors = []
    for blocks in (ours, theirs):
        restored = torch.empty_like(values)
        _core.dequantize(kind, blocks, restored)
        squares = np.square((restored - values).numpy(), dtype=np.float64)
        errors.append(float((squares * (1 if importance is None else importance.double().numpy())).sum()))
    return errors[0] / errors[1]


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", ["blk.3.ffn_down.weight", "blk.17.ffn_down.weight", "token_embd.weight"])
def test_our_error_is_not_larger(ggml: ctypes.CDLL, smollm2: Path, kind: str, name: str) -> None:
    values = weights(smollm2, name).reshape(-1)[: 2048 * 512].reshape(-1, 512).contiguous()
    found = share(ggml, kind, values)
    print(f"{kind} {name}: {found:.3f} of llama.cpp's squared error")
    assert found <= 1


TEXT = "The river rises in the mountains, crosses three valleys, and reaches the sea after nine hundred kilometres. "


@pytest.fixture(scope="module")
def importance(smollm2: Path) -> dict[str, torch.Tensor]:
    """The mean squares of the real model's inputs, by GGUF's names of its feed-forward layers."""
    loaded = models.load(smollm2)
    found = input_statistics(loaded.model, [RaggedBatch.pack([loaded.tokenizer.encode(TEXT * 8)])])
    return {
        f"blk.{layer}.ffn_{part}.weight": found[f"model.layers.{layer}.mlp.{part}_proj"].second_moment.float()
        for layer in range(30)
        for part in ("up", "down")
    }


# the last one but one has inputs of which a single column outweighs all others
@pytest.mark.parametrize("name", ["blk.3.ffn_down.weight", "blk.28.ffn_down.weight", "blk.10.ffn_up.weight"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_our_weighted_error_is_not_larger(
    ggml: ctypes.CDLL, smollm2: Path, importance: dict[str, torch.Tensor], kind: str, name: str
) -> None:
    values = weights(smollm2, name)
    if values.shape[1] % SIZES[kind][0]:
        values = values[:, :512].contiguous()
    found = share(ggml, kind, values, importance[name][: values.shape[1]].contiguous())
    print(f"{kind} {name}: {found:.3f} of llama.cpp's weighted squared error")
    assert found <= 1
