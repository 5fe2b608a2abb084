"""The engine's step: one forward pass over a ragged batch, for whichever requests the scheduler put in it."""

import os
import threading
from typing import Any

import torch
from torch import Tensor

from ftkit import _core
from ftkit.engine._shelf import Shelf
from ftkit.kernels import PIN, allows
from ftkit.kernels.decoder_layers import whole_step
from ftkit.kernels.next_logits import next_logits
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.nn.paged_cache import PagedCache


class ModelStep:
    """Called by the core's thread with the sizes of a batch that it has written to `workspace`."""

    def __init__(self, model: Decoder, cache: PagedCache, *, tokens: int, sequences: int, blocks: int) -> None:
        """Room for `tokens` tokens in `sequences` sequences of up to `blocks` pages."""
        self.model, self.cache = model, cache
        self.shelf = Shelf(model, cache)
        self.lock = threading.Lock()
        """Held during a step; whoever changes the model's adapters holds it too."""
        self._whole: tuple[tuple[Any, ...], _core.DecoderStep | None] | None = None
        sizes = (tokens, tokens, sequences + 1, sequences, sequences * blocks, tokens)
        self.workspace = [torch.zeros(size, dtype=torch.int32) for size in sizes]

    @property
    def whole(self) -> _core.DecoderStep | None:
        """The step as one call into the core, which then computes batches of the base and of adapters that it knows
        there, and others here; None where it has none."""
        now = (self.model.revision, os.environ.get(PIN))
        if self._whole is None or self._whole[0] != now:
            step = whole_step(self.model, self.cache) if allows("fused") else None
            self._whole = (now, step)
        return self._whole[1]

    def __call__(
        self, tokens: int, blocks: int, rows: int, lengths: tuple[int, ...], adapters: tuple[int, ...]
    ) -> Tensor:
        """Float32 logits [rows, vocabulary], on the CPU."""
        device = self.model.device
        count = len(lengths)
        stream, positions, ends, adapter, table, wanted = self.workspace
        with self.lock, torch.inference_mode():
            batch = RaggedBatch(
                tokens=stream[:tokens].to(device),
                positions=positions[:tokens].to(device),
                cu_seqlens=ends[: count + 1].to(device),
                adapter=adapter[:count].to(device),
                block_table=table[: count * blocks].view(count, blocks).to(device),
                host_lengths=lengths,
                host_adapter=adapters,
            )
            return next_logits(batch, wanted[:rows], self.cache, self.model).float().cpu().contiguous()

    def fetch(self, adapter: int) -> tuple[int, str]:
        """`Shelf.fetch`, on another thread."""
        return self.shelf.fetch(adapter)

    def install(self, adapter: int, pages: list[int]) -> None:
        """`Shelf.install`, between two steps."""
        with self.lock, torch.inference_mode():
            self.shelf.install(adapter, pages)

    def evict(self, adapter: int) -> None:
        """`Shelf.evict`, between two steps."""
        with self.lock:
            self.shelf.evict(adapter)

    def forget(self, adapter: int) -> None:
        """`Shelf.forget`, on another thread."""
        self.shelf.forget(adapter)

    def embed(self, tokens: list[int], adapter: int) -> Tensor:
        """The hidden states after the final norm, averaged over the tokens, float32 [d] on the CPU; without a cache."""
        with self.lock, torch.inference_mode():
            batch = RaggedBatch.pack([tokens], adapter=adapter, device=self.model.device)
            hidden: Tensor = self.model(batch)  # [tokens, d]
            return hidden.float().mean(0).cpu().contiguous()
