"""Sizes as people write them."""

import pytest

from ftkit.errors import InputError
from ftkit.plan.budget import available_bytes, parse_bytes

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("500 MB", 500 * 10**6), ("1.5gib", 3 * 2**29), ("1024", 1024), ("2 KiB", 2048)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "8 XB", "1e9", "8GiB more"])
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="expected a size such as 8GiB"):
        parse_bytes(text)


def test_some_memory_is_free() -> None:
    assert 0 < available_bytes() < 2**50
