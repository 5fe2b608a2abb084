"""Large tensors of a training process go back to the system as soon as they are freed."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

_TRIAL = """
from ftkit.train import heap
if {settles}:
    heap.settle()
import torch
from ftkit.train.memory import rss_bytes

torch.ones(31 << 18), torch.ones(31 << 18)  # after which glibc has such sizes in its heap
before = rss_bytes()
large, small = [], []
for _ in range(8):
    large.append(torch.ones(5 << 18))
    small.append(torch.ones(1 << 10))
del large
print(rss_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' heaps are left alone")
def test_freed_tensors_are_no_longer_the_process() -> None:
    kept = {}
    for settles in (False, True):
        words = [sys.executable, "-c", _TRIAL.format(settles=settles)]
        kept[settles] = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert kept[True] < 8 << 20 < 24 << 20 < kept[False]


def test_it_is_settled_before_torch_is_there() -> None:
    """torch asks for huge pages only where it is told so before its first tensor."""
    told = "import sys\nfrom ftkit.train import heap\nprint('torch' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "False"
