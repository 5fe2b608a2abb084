"""Kernels compiled for the CPU once for all tests."""

import pytest
from tests.unit.cuda.emulated import VARIANTS

from ftkit.cuda.on_cpu import Library, build
from ftkit.cuda.source import Variant


@pytest.fixture(scope="session")
def libraries() -> dict[Variant, Library]:
    """The variants that tests launch, compiled."""
    return dict(zip(VARIANTS, build(VARIANTS), strict=True))
