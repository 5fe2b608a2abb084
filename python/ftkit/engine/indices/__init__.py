"""Indices of passages: what retrieval asks. One file a way to search.

    passages = read(Path("notes"))                   files as they are, cut into passages
    index = open_index(passages, "bm25")             from the cache, or made anew
    index.search([index.query("who?")], 3)           numbers of passages, the best first

A file here has `build(texts, folder, encoder)`, which writes the index, and `load(folder, encoder)`, which opens it.
An index lies in the cache under the hash of all its passages, so one whose files changed is made anew.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ftkit import plugins
from ftkit.config.cache import cache_directory
from ftkit.engine.indices._encoder import Encoder, encoder_of
from ftkit.engine.indices._passages import Collection, Passage, read
from ftkit.errors import FtkitError

__all__ = ["Collection", "Encoder", "Index", "Passage", "encoder_of", "open_index", "read"]

_FORM = 1
"""Changes when what an index consists of does."""


class Index(Protocol):
    """Finds passages. Its order is the same in both calls, alone or among others: by score, then by number."""

    def query(self, text: str) -> Any:
        """The text in the form in which it is looked for."""
        ...

    def search(self, queries: Sequence[Any], count: int) -> list[list[int]]:
        """For each query the `count` best passages of all, the best first; fewer where no more match."""
        ...

    def rank(self, query: Any, passages: Sequence[int]) -> list[int]:
        """Those of these passages that match, the best first, by the scores that they have among all."""
        ...


def open_index(collection: Collection, way: str = "bm25", encoder: Encoder | None = None) -> Index:
    """The index of passages by `way`, from the cache or made anew; `encoder` is what dense ones are embedded with.

    Raises InputError for a way that is not known or needs what is missing.
    """
    module = plugins.load("engine.indices", way)
    content = hashlib.sha256(f"{_FORM}\0{encoder.fingerprint if encoder else ''}".encode())
    for passage in collection.passages:
        content.update(hashlib.sha256(passage.text.encode()).digest())
    place = hashlib.sha256(str(collection.path.resolve()).encode()).hexdigest()[:16]
    room = cache_directory() / "retrieval"
    own = f"{way}-{place}-"
    folder = room / f"{own}{content.hexdigest()[:32]}"
    if not folder.is_dir():
        try:
            room.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".", dir=room))
        except OSError as error:
            raise FtkitError(
                f"{room}: expected a directory for the index, got: {str(error.strerror).lower()}"
            ) from error
        try:
            module.build([passage.text for passage in collection.passages], made, encoder)
            _named(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        for old in room.glob(f"{own}*"):
            if old != folder:  # of these files before they changed
                shutil.rmtree(old, ignore_errors=True)
    index: Index = module.load(folder, encoder)
    return index


def _named(made: Path, folder: Path) -> None:
    """Gives a finished index its name; another process may have been quicker."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():
            raise
