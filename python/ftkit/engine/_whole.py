"""A model's step over a cache as one call into the core, from token ids to logits."""

import os
from typing import Any

from ftkit import _core
from ftkit.kernels import PIN, allows
from ftkit.kernels.decoder_layers import whole_step
from ftkit.nn.decoder import Decoder
from ftkit.nn.paged_cache import PagedCache


class Whole:
    """Keeps the step for as long as the model is the same."""

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self._model, self._cache = model, cache
        self._found: tuple[tuple[Any, ...], _core.DecoderStep | None] | None = None

    def step(self) -> _core.DecoderStep | None:
        """It computes batches of the base and of adapters that it knows; None where the core has none."""
        now = (self._model.revision, os.environ.get(PIN))
        if self._found is None or self._found[0] != now:
            step = whole_step(self._model, self._cache) if allows("fused") else None
            self._found = (now, step)
        return self._found[1]
