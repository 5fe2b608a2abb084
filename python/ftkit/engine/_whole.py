"""A model's step over a cache as one call into the core, from token ids to logits."""

import os
from typing import Any

from ftkit import _core
from ftkit.kernels import PIN, allows
from ftkit.kernels.decoder_layers import whole_step
from ftkit.nn.decoder import Decoder
from ftkit.nn.paged_cache import PagedCache


class Whole:
    """Keeps the step for as long as the model is the same, with the adapters that are in the cache's pages."""

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self._model, self._cache = model, cache
        self._found: tuple[tuple[Any, ...], _core.DecoderStep | None] | None = None
        self._layers: _core.DecoderLayers | None = None
        """Of the step that was there last: the adapters in pages are on them."""
        self._paged: dict[int, tuple[_core.LoraForm, list[int]]] = {}

    def step(self) -> _core.DecoderStep | None:
        """It computes batches of the base and of adapters that it knows; None where the core has none."""
        now = (self._model.revision, os.environ.get(PIN))
        if self._found is None or self._found[0] != now:
            step = whole_step(self._model, self._cache) if allows("fused") else None
            self._found = (now, step)
            if step is not None:
                self._layers = step.layers
                for adapter, place in self._paged.items():
                    self._layers.add_paged_adapter(adapter, place[0], self._cache.pool, place[1])
        return self._found[1]

    def put(self, adapter: int, form: _core.LoraForm, pages: list[int]) -> None:
        """An adapter is in these pages."""
        self._paged[adapter] = (form, pages)
        if self._layers is not None:
            self._layers.add_paged_adapter(adapter, form, self._cache.pool, pages)

    def take(self, adapter: int) -> None:
        """Its pages are another's."""
        del self._paged[adapter]
        if self._layers is not None:
            self._layers.remove_adapter(adapter)
