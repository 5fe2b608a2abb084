"""Finetune a language model on your own data and serve the result, on one machine."""

from ftkit._core import __version__

__all__ = ["__version__"]
