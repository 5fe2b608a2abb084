"""Finetune a language model on your own data and serve the result, on one machine."""

import os

# OpenMP's threads spin at the end of each loop, and where another process wants a core, every loop waits for the one
# that was put aside; torch's library reads this when it is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ftkit._core import __version__

__all__ = ["__version__"]
