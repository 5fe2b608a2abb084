"""Products with blocks: what the dequantized matrix gives, the same bits for a row alone, on every format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ftkit import _core
from ftkit.kernels.block_matmul import block_matmul, columns_of, dequantize

pytestmark = pytest.mark.unit

FORMATS = {name: (size, nbytes) for name, size, nbytes in _core.quant_formats()}


@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(0, 9),
    st.integers(0, 99),
    st.booleans(),
)
@settings(max_examples=90, deadline=None)
def test_equals_the_reference(kind: str, rows: int, blocks: int, count: int, seed: int, training: bool) -> None:
    size, nbytes = FORMATS[kind]
    columns = max(size, 23) * blocks if size == 1 else size * blocks
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(rows, columns, generator=generator), torch.randn(count, columns, generator=generator)
    stored = torch.empty(rows, columns // size * nbytes, dtype=torch.uint8)
    _core.quantize(kind, weight, stored)
    found = block_matmul(x, kind, stored, training)
    exact = x.double() @ dequantize(kind, stored).double().T
    bound = (x.double().abs() @ dequantize(kind, stored).double().abs().T) * 1e-6  # a few roundings of each product
    assert ((found.double() - exact).abs() <= bound + 1e-30).all()
    torch.testing.assert_close(found, block_matmul.reference(x, kind, stored), rtol=1e-4, atol=1e-4)
    strided = torch.randn(count, 2 * columns, generator=generator)[:, ::2]
    once = block_matmul(strided.contiguous(), kind, stored, training)
    assert torch.equal(block_matmul(strided, kind, stored, training), once)
    for row in range(count):
        assert torch.equal(block_matmul(x[row : row + 1], kind, stored, training), found[row : row + 1])


def test_fake_tensors_have_the_shapes() -> None:
    with FakeTensorMode():
        stored = torch.empty(7, 40, dtype=torch.uint8)
        assert block_matmul(torch.empty(3, 64), "q4_1", stored).shape == (3, 7)
        assert dequantize("q4_1", stored).shape == (7, columns_of("q4_1", stored)) == (7, 64)
