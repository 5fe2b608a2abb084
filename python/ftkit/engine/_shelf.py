"""Adapters that live on disk, and in pages of the engine's pool while they are in use.

    fetch     read from disk, on the core's thread for that, while steps go on
    install   weights to the pages that the scheduler has given; rows under the adapter may follow
    evict     the pages are another's

An adapter that is a LoRA, of whatever method and ranks, is written to the pages as its matrices A and B, and the model
computes with them there. What is no LoRA (a layer trained whole, a bias) stays in memory of its own, and its pages are
left untouched: they are what it is charged.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftkit import adapters
from ftkit.errors import FtkitError, InputError
from ftkit.kernels.lora_linear import lora_linear
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import Weight
from ftkit.nn.paged_cache import PagedCache

ALIGNMENT = 64
"""Bytes to which matrices are aligned in a page: a line of the processor's cache."""


class LowRank(nn.Module):
    """A LoRA whose matrices are somebody else's memory; for computing only."""

    bias: Tensor | None = None

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = a, b, scale

    def forward(self, x: Tensor, weight: Weight) -> Tensor:
        """x [rows, in] to [rows, out]."""
        return lora_linear(x, weight, self.a.to(x.dtype), self.b.to(x.dtype), self.scale)

    def merged(self, weight: Weight) -> Tensor:
        """W + s B A, in W's dtype."""
        dense = weight.dense()
        return (dense.to(self.a.dtype) + self.scale * (self.b @ self.a)).to(dense.dtype)

    def merged_weight(self, weight: Weight) -> Weight | None:  # noqa: ARG002
        """None: W's codes cannot hold it."""
        return None

    def as_lora(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s."""
        return self.a, self.b, self.scale


@dataclass
class _Book:
    """One adapter on disk."""

    folder: Path
    content: str | None = None
    """The hash of its files when it was read first: other files under this number would be another adapter."""
    attached: adapters.Attached | None = None
    staged: dict[str, nn.Module] | None = None
    places: list[tuple[int, int]] = field(default_factory=list)
    """Of the staged matrices in order, A before B: (number of the page, first byte); empty: not written to pages."""


class Shelf:
    """The adapters that a model's requests may ask for, by number."""

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self._model, self._cache = model, cache
        self._shell = model.shell()
        self._books: dict[int, _Book] = {}
        self._lock = threading.Lock()

    def put(self, adapter: int, folder: Path) -> None:
        """Notes where an adapter lies, under a number that never had another."""
        self._books[adapter] = _Book(folder)

    def fetch(self, adapter: int) -> tuple[int, str]:
        """Reads an adapter and keeps it until it is installed; (pages that it takes, hash of its content).

        Raises InputError when it is none, not for this model, or not what it was when it was read before.
        """
        book = self._books[adapter]
        with self._lock:
            content = adapters.content(book.folder)
            attached, modules = adapters.read(self._shell, book.folder)
            # keys and values are found again by the content that they were computed under
            if content != adapters.content(book.folder) or content != (book.content or content):
                raise InputError(f"{book.folder}: expected the files that were added, got others", "add it anew")
            book.content, book.attached, book.staged = content, attached, modules
            pages = self._plan(book, modules)
        return pages, content

    def without_place(self, adapter: int, text: str) -> str:
        """A message without the directories above an adapter's own."""
        folder = self._books[adapter].folder
        for parent in (folder.absolute().parent, folder.resolve().parent, folder.parent):
            text = text.replace(f"{parent}/", "")
        return text

    def check(self, adapter: int) -> None:
        """Reads an adapter for its errors. Raises InputError as `fetch` does."""
        try:
            self.fetch(adapter)
        except InputError:
            self.forget(adapter)
            raise
        self._books[adapter].staged = None

    def install(self, adapter: int, pages: list[int]) -> None:
        """Writes a fetched adapter to these pages and puts it on the model."""
        book = self._books[adapter]
        modules, book.staged = book.staged, None
        if modules is None or book.attached is None:
            raise FtkitError(f"adapter {adapter}: expected one that was fetched")
        if book.places:
            places = iter(book.places)
            modules = {name: self._paged(module, pages, next(places), next(places)) for name, module in modules.items()}
        layers = self._model.layers_by_name()
        for name, module in modules.items():
            layers[name].adapters[str(adapter)] = module.train(self._model.training)
        self._model.attached[adapter] = book.attached

    def evict(self, adapter: int) -> None:
        """Takes an adapter off the model, if it is there, and lets go what was fetched."""
        book = self._books.get(adapter)
        if book is not None:
            book.staged = None
        if adapter in self._model.attached:
            adapters.detach(self._model, adapter)

    def forget(self, adapter: int) -> None:
        """Nobody will ask for it again."""
        self._books.pop(adapter, None)

    def clear(self) -> None:
        """Takes everything off the model; for when no more steps come."""
        for adapter in list(self._books):
            self.evict(adapter)
            self.forget(adapter)

    def _plan(self, book: _Book, modules: Mapping[str, nn.Module]) -> int:
        """Places for the matrices, one after another, each in one page; the number of pages."""
        page_bytes = self._cache.pool.shape[1]
        book.places, page, at = [], 0, 0
        for module in modules.values():
            lora = _lora(module)
            sizes = [] if lora is None else [matrix.numel() * 4 for matrix in lora[:2]]
            if not sizes or max(sizes) > page_bytes or page_bytes % 4:
                book.places = []
                stored = {id(tensor): tensor.nbytes for module in modules.values() for tensor in module.parameters()}
                return max(1, -(-sum(stored.values()) // page_bytes))
            for size in sizes:
                if at + size > page_bytes:
                    page, at = page + 1, 0
                book.places.append((page, at))
                at += -(-size // ALIGNMENT) * ALIGNMENT
        return page + 1

    def _paged(self, module: nn.Module, pages: list[int], *places: tuple[int, int]) -> LowRank:
        """The LoRA of a module, over pages of the pool."""
        lora = _lora(module)
        assert lora is not None  # or it would have no places
        views = []
        # B by columns: so the core adds them up without lanes to sum over
        for matrix, (page, at) in zip((lora[0], lora[1].t()), places, strict=True):
            row = self._cache.pool[pages[page]]
            view = row[at : at + matrix.numel() * 4].view(torch.float32)
            views.append(view.view(matrix.shape))
            views[-1].copy_(matrix)
        return LowRank(views[0], views[1].t(), lora[2])


def shelved(folder: Path) -> Iterator[tuple[str, Path]]:
    """The adapters in a directory, by their folders' names in order; of a run, its adapter. No link leads out of it."""
    for path in sorted(folder.iterdir()):
        for place in (path, path / "adapter"):
            parts = (place, place / "adapter_config.json", place / "adapter_model.safetensors")
            if parts[1].is_file() and not any(part.is_symlink() for part in (path, *parts)):
                yield path.name, place
                break


def _lora(module: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and s of what is a LoRA and nothing besides."""
    if not hasattr(module, "as_lora") or module.bias is not None:
        return None
    lora = module.as_lora()
    return None if lora is None else (lora[0].detach(), lora[1].detach(), lora[2])
