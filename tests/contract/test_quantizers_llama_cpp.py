"""Every quantizer against llama.cpp's own, on the weights of the real model: our error is not larger."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from ftkit import _core
from ftkit._core import GgufFile

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


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", ["blk.3.ffn_down.weight", "blk.17.ffn_down.weight", "token_embd.weight"])
def test_our_error_is_not_larger(ggml: ctypes.CDLL, smollm2: Path, kind: str, name: str) -> None:
    file = GgufFile(smollm2)
    shape = next(shape for tensor, shape, _ in file.tensors if tensor == name)
    values = torch.empty(shape)
    file.read(name, values)
    # the real weights lie on a grid themselves: noise of a tenth of a step makes them as they were before
    generator = torch.Generator().manual_seed(1)
    values += torch.randn(shape, generator=generator) * values.std() / 50
    values = values.reshape(-1)[: 2048 * 512].reshape(-1, 512).contiguous()
    size, nbytes = SIZES[kind]
    theirs, ours = (torch.empty(values.numel() // size * nbytes, dtype=torch.uint8) for _ in range(2))
    ggml.ggml_quantize_chunk(NUMBERS[kind], values.data_ptr(), theirs.data_ptr(), 0, *values.shape, None)
    _core.quantize(kind, values, ours)
    errors = []
    for blocks in (ours, theirs):
        restored = torch.empty_like(values)
        _core.dequantize(kind, blocks, restored)
        errors.append(float(np.square((restored - values).numpy(), dtype=np.float64).sum()))
    print(f"{kind} {name}: {errors[0] / errors[1]:.3f} of llama.cpp's squared error")
    assert errors[0] <= errors[1]
