"""What the process has is its own: nothing of its parent's."""

import subprocess
import sys

import pytest

from ftkit.train import memory

pytestmark = pytest.mark.unit


def test_the_peak_follows_what_is_taken() -> None:
    before = memory.peak_rss_bytes()
    taken = b"x" * (memory.peak_rss_bytes() - memory.rss_bytes() + (64 << 20))
    assert before + (60 << 20) < memory.peak_rss_bytes() < before + (80 << 20)
    assert memory.rss_bytes() >= len(taken)


def test_a_child_does_not_count_its_parent() -> None:
    taken = b"x" * (1 << 30)
    source = "from ftkit.train import memory; print(memory.peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert memory.peak_rss_bytes() > len(taken) > int(child.stdout)
