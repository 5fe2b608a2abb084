"""Where what can be made again is kept between runs."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$FTKIT_CACHE`, or `ftkit` in the user's cache directory."""
    chosen = os.environ.get("FTKIT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftkit"
