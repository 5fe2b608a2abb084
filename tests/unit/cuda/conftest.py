"""Kernels compiled for the CPU once for all tests."""

import pytest
from tests.unit.cuda.emulated import VARIANTS, Emulated

from ftkit.cuda.on_cpu import build


@pytest.fixture(scope="session")
def kit() -> Emulated:
    """The variants that tests launch, compiled."""
    return Emulated(dict(zip(VARIANTS, build(VARIANTS), strict=True)))
