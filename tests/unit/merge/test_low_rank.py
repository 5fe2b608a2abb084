"""The factors of a remainder: as near as a full decomposition's, whatever the shape and the rank."""

import itertools

import pytest
import torch

from ftkit.errors import InputError
from ftkit.merge.onto._low_rank import factors

pytestmark = pytest.mark.unit


def random(out: int, into: int, decay: float) -> torch.Tensor:
    """A matrix whose singular values fall by `decay` each."""
    generator = torch.Generator().manual_seed(out * into)
    left, right = (torch.linalg.qr(torch.randn(n, min(out, into), generator=generator))[0] for n in (out, into))
    return left * decay ** torch.arange(min(out, into)) @ right.T


@pytest.mark.parametrize("decay", [0.7, 0.97, 1.0])
@pytest.mark.parametrize(("out", "into", "rank"), [(7, 5, 3), (131, 97, 11), (53, 211, 2), (101, 103, 1)])
def test_no_matrix_of_the_rank_is_nearer(out: int, into: int, rank: int, decay: float) -> None:
    matrix = random(out, into, decay)
    a, b = factors(matrix, rank)
    assert (a.shape, b.shape) == ((rank, into), (out, rank))
    least = torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt()
    # equal singular values leave nothing to find; there any directions are as good, up to 1 in 200
    assert (matrix - b @ a).norm() <= least * (1.005 if decay == 1 else 1.0001) + 1e-6


def test_more_rank_is_nearer_and_all_of_it_is_exact() -> None:
    matrix = random(37, 61, 0.9)
    errors = [float((matrix - b @ a).norm()) for a, b in (factors(matrix, rank) for rank in range(1, 38))]
    assert all(more < less for less, more in itertools.pairwise(errors))
    assert errors[-1] < 1e-5


def test_a_rank_beyond_the_matrix_adds_zeros() -> None:
    matrix = random(3, 5, 0.5)
    a, b = factors(matrix, 9)
    torch.testing.assert_close(b @ a, matrix)
    assert not a[3:].any()
    assert not b[:, 3:].any()


def test_the_same_matrix_gives_the_same_factors() -> None:
    matrix = random(131, 97, 0.9)
    assert all(torch.equal(one, other) for one, other in zip(factors(matrix, 4), factors(matrix, 4), strict=True))
    assert not any(part.any() for part in factors(torch.zeros(131, 97), 4))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(wrong: float) -> None:
    matrix = torch.ones(5, 7)
    matrix[2, 3] = wrong
    with pytest.raises(InputError, match="expected finite weights"):
        factors(matrix, 2)
