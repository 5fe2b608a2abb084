"""AdamW over 8 bits in the core against its reference: codes, scales and weights, on sizes that no block divides."""

import pytest
import torch

from ftkit.kernels.blockwise_adamw import BLOCK, Blocks, Factors, blockwise_adamw, dynamic_map, edges_of

pytestmark = pytest.mark.unit

FACTORS = Factors(beta1=0.9, beta2=0.99, epsilon=1e-8, rate=0.03, correction=0.7, kept=0.98)


def state(count: int, signed: bool, seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (count,), generator=generator, dtype=torch.uint8)
    return Blocks(
        codes=codes, greatest=torch.rand(-(-count // BLOCK), generator=generator), map=dynamic_map(signed=signed)
    )


@pytest.mark.parametrize("count", [1, 255, 256, 257, 32 * 256, 32 * 256 + 1, 50_021])
def test_the_core_is_the_reference(count: int) -> None:
    gradient = torch.randn(count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-9, 0, count)
    gradient[::7] = 0
    found = []
    for function in (blockwise_adamw.reference, blockwise_adamw):
        weight = torch.linspace(-1, 1, count)
        mean, square = state(count, True, 1), state(count, False, 2)
        for _ in range(3):
            function(weight, gradient, mean, square, FACTORS)
        found.append((weight, mean, square))
    (expected, *expected_states), (weight, *states) = found
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(states, expected_states, strict=True):
        torch.testing.assert_close(ours.greatest, theirs.greatest, rtol=1e-6, atol=0)
        apart = (ours.codes.int() - theirs.codes.int()).abs()  # where rounding decides between two that are as near
        assert int(apart.max()) <= 1
        assert float((apart > 0).float().mean()) < 1e-3


def test_the_core_works() -> None:
    assert blockwise_adamw.backends == ["cuda", "cpu", "reference"]


@pytest.mark.parametrize("signed", [True, False])
def test_edges_lie_between_values_and_zero_has_its_own(signed: bool) -> None:
    table = dynamic_map(signed=signed)
    edges = edges_of(table)
    assert bool(((table[:-1] <= edges) & (edges < table[1:])).all())
    assert (float(edges[0]) == 0) == (not signed)
