"""Finetune a language model on your own data and serve the result, on one machine."""

import os

# OpenMP's threads spin at the end of each loop, and where another process wants a core, every loop waits for the one
# that was put aside. They sleep instead; those of GNU's library after a moment, since waking up for each short loop
# takes llama.cpp four times as long. Libraries read this when they are loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from ftkit._core import __version__

__all__ = ["__version__"]
