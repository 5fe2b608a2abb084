"""Where a training process' tensors lie: large ones in mappings of their own, of huge pages where the system has them.

The C library's heap keeps what is freed, and small things that stay break up its holes, so that a step's tensors do not
fit where the last step's were. A mapping goes back to the system as soon as its tensor is freed; getting pages anew
costs time, of which huge pages take most away. And what oneDNN keeps beside tensors has a bound.
"""

import ctypes
import os
import sys

LARGE_BYTES = 4 << 20
"""From which size on a tensor has its mapping.

Measured with 10 layers of SmolLM2 and rows of 512 tokens, three steps, once each on a busy machine: 1,597 MiB at the
peak against 1,771 MiB of the heap alone, for 9.0 seconds of processor time against 9.1; from 8 MiB on and without huge
pages 1,680 MiB and 10.0 seconds."""

PRODUCTS = 64
"""Shapes of products in bfloat16 whose code oneDNN keeps, of 1,024 by itself: batches of other lengths are others.
Three steps of a small model: 1,220 MiB instead of 1,502, on a processor with AMX."""

_M_MMAP_THRESHOLD = -3  # mallopt(3)


def settle() -> None:
    """To be called before torch makes its first tensor; later, there are no huge pages.

    C libraries other than glibc give memory back in their own way, and are left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS))  # as oneDNN does this
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
