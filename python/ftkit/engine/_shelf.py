"""Adapters that live on disk, and in pages of the engine's pool while they are in use.

    fetch     read from disk, on the core's thread for that, while steps go on
    install   weights to the pages that the scheduler has given; rows under the adapter may follow
    evict     the pages are another's

An adapter that is a LoRA, of whatever ranks, goes to the pages as its matrices A and B, and the core's step computes
with them there. The model's own modules get to know it only when something is to be computed under it that the core's
step does not compute (`wear`). What is no LoRA of matrices that its file has (a layer trained whole, a bias) stays in
memory of its own, and its pages are left untouched: they are what it is charged.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ftkit import adapters
from ftkit.engine._form import Form, Forms
from ftkit.engine._whole import Whole
from ftkit.errors import FtkitError, InputError
from ftkit.nn.decoder import Decoder
from ftkit.nn.paged_cache import PagedCache


@dataclass(frozen=True)
class _Pages:
    """A LoRA that was fetched: what its pages are to hold, uint8 [pages, bytes of a page]."""

    form: Form
    content: Tensor


@dataclass(frozen=True)
class _Modules:
    """Another adapter that was fetched."""

    attached: adapters.Attached
    modules: Mapping[str, nn.Module]


@dataclass
class _Book:
    """One adapter on disk."""

    folder: Path
    content: str | None = None
    """The hash of its files when it was read first: other files under this number would be another adapter."""
    staged: _Pages | _Modules | None = None


class Shelf:
    """The adapters that a model's requests may ask for, by number."""

    def __init__(self, model: Decoder, cache: PagedCache, whole: Whole) -> None:
        """`whole`: the model's step over the cache."""
        self._model, self._cache, self._whole = model, cache, whole
        self._shell = model.shell()
        self._forms = Forms(model.linears(), cache.pool.shape[1])
        self._books: dict[int, _Book] = {}
        self._in_pages: dict[int, tuple[Form, list[int]]] = {}
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
            files = adapters.snapshot(book.folder)
            # keys and values are found again by the content that they were computed under
            content = files.content
            if content != (book.content or content):
                raise _others(book.folder)
            form = self._forms.find(files)
            staged: _Pages | _Modules | None = None if form is None else self._write(form, files)
            if staged is None:
                staged = self._read(book.folder, files, content)
            book.content, book.staged = content, staged
        return self._size(staged), content

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
        """Writes a fetched adapter to these pages; rows under it may follow."""
        book = self._books[adapter]
        staged, book.staged = book.staged, None
        if staged is None:
            raise FtkitError(f"adapter {adapter}: expected one that was fetched")
        if isinstance(staged, _Modules):
            self._attach(adapter, staged.attached, staged.modules)
            return
        for page, content in zip(pages, staged.content, strict=True):
            self._cache.pool[page].copy_(content)
        self._in_pages[adapter] = (staged.form, pages)
        self._whole.put(adapter, staged.form.core, pages)

    def wear(self, numbers: Iterable[int]) -> None:
        """Puts those of the adapters that are in pages on the model's modules, for what the core's step does not
        compute."""
        for adapter in numbers:
            if adapter in self._in_pages and adapter not in self._model.attached:
                form, pages = self._in_pages[adapter]
                self._attach(adapter, form.attached, dict(form.modules(self._cache.pool, pages)))

    def evict(self, adapter: int) -> None:
        """Takes an adapter away, if it is there, and lets go what was fetched."""
        book = self._books.get(adapter)
        if book is not None:
            book.staged = None
        if self._in_pages.pop(adapter, None) is not None:
            self._whole.take(adapter)
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

    def _read(self, folder: Path, files: adapters.Snapshot, content: str) -> _Pages | _Modules:
        """An adapter as any is read; of a LoRA, the form is learned."""
        attached, modules = adapters.read(self._shell, folder)
        if content != adapters.content(folder):
            raise _others(folder)
        form = self._forms.learn(files, attached, modules)
        staged = None if form is None else self._write(form, files)
        return staged or _Modules(attached, modules)

    def _write(self, form: Form, files: adapters.Snapshot) -> _Pages | None:
        """A LoRA as its form says; None where the file is not all there or has numbers that are not finite."""
        pages = torch.empty((form.core.pages, self._cache.pool.shape[1]), dtype=torch.uint8)
        return _Pages(form, pages) if form.core.write(files.weights, pages) else None

    def _size(self, staged: _Pages | _Modules) -> int:
        """Pages that an adapter takes, or is charged."""
        if isinstance(staged, _Pages):
            return staged.form.core.pages
        stored = {id(tensor): tensor.nbytes for module in staged.modules.values() for tensor in module.parameters()}
        return max(1, -(-sum(stored.values()) // self._cache.pool.shape[1]))

    def _attach(self, adapter: int, attached: adapters.Attached, modules: Mapping[str, nn.Module]) -> None:
        layers = self._model.layers_by_name()
        for name, module in modules.items():
            layers[name].adapters[str(adapter)] = module.train(self._model.training)
        self._model.attached[adapter] = attached


def shelved(folder: Path) -> Iterator[tuple[str, Path]]:
    """The adapters in a directory, by their folders' names in order; of a run, its adapter. No link leads out of it."""
    for path in sorted(folder.iterdir()):
        for place in (path, path / "adapter"):
            parts = (place, place / "adapter_config.json", place / "adapter_model.safetensors")
            if parts[1].is_file() and not any(part.is_symlink() for part in (path, *parts)):
                yield path.name, place
                break


def _others(folder: Path) -> InputError:
    return InputError(f"{folder}: expected the files that were added, got others", "add it anew")
