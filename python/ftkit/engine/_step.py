"""The engine's step: one forward pass over a ragged batch, for whichever requests the scheduler put in it."""

import sys
import threading

import torch
from torch import Tensor

from ftkit import _core
from ftkit.engine._draft import Drafter
from ftkit.engine._shelf import Shelf
from ftkit.engine._whole import Whole
from ftkit.errors import FtkitError
from ftkit.kernels.next_logits import next_logits
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.nn.paged_cache import PagedCache


class ModelStep:
    """Called by the core's thread with the sizes of a batch that it has written to `workspace`."""

    def __init__(
        self,
        model: Decoder,
        cache: PagedCache,
        *,
        tokens: int,
        sequences: int,
        blocks: int,
        drafter: Drafter | None = None,
    ) -> None:
        """Room for `tokens` tokens in `sequences` sequences of up to `blocks` pages."""
        self.model, self.cache, self._drafter = model, cache, drafter
        self._whole = Whole(model, cache)
        self.shelf = Shelf(model, cache, self._whole)
        self.lock = threading.Lock()
        """Held during a step; whoever changes the model's adapters holds it too."""
        sizes = (tokens, tokens, sequences + 1, sequences, sequences * blocks, tokens)
        self.workspace = [torch.zeros(size, dtype=torch.int32) for size in sizes]

    @property
    def whole(self) -> _core.DecoderStep | None:
        """The step as one call into the core, which then computes batches of the base and of adapters that it knows
        there, and others here; None where it has none."""
        return self._whole.step()

    @property
    def whole_draft(self) -> _core.DecoderStep | None:
        """The same of the model that makes drafts."""
        return None if self._drafter is None else self._drafter.whole()

    def __call__(
        self, tokens: int, blocks: int, rows: int, lengths: tuple[int, ...], adapters: tuple[int, ...]
    ) -> Tensor:
        """Float32 logits [rows, vocabulary], on the CPU."""
        with self.lock, torch.inference_mode():
            self.shelf.wear(adapters)
            batch, wanted = self._batch(tokens, blocks, rows, lengths, adapters)
            return next_logits(batch, wanted, self.cache, self.model).float().cpu().contiguous()

    def hidden(
        self, tokens: int, blocks: int, rows: int, lengths: tuple[int, ...], adapters: tuple[int, ...]
    ) -> Tensor:
        """The hidden states after the final norm of all tokens, float32 [tokens, d] on the CPU."""
        with self.lock, torch.inference_mode():
            self.shelf.wear(adapters)
            batch, _ = self._batch(tokens, blocks, rows, lengths, adapters)
            hidden: Tensor = self.model(batch, self.cache)
            return hidden.float().cpu().contiguous()

    def draft(self, tokens: int, blocks: int, rows: int, lengths: tuple[int, ...], adapters: tuple[int, ...]) -> Tensor:
        """The same by the model that makes drafts."""
        assert self._drafter is not None  # or the core would not ask
        with torch.inference_mode():
            return self._drafter(*self._batch(tokens, blocks, rows, lengths, adapters)).float().cpu().contiguous()

    def _batch(
        self, tokens: int, blocks: int, rows: int, lengths: tuple[int, ...], adapters: tuple[int, ...]
    ) -> tuple[RaggedBatch, Tensor]:
        """What the workspace holds, and the rows whose logits are wanted."""
        device = self.model.device
        count = len(lengths)
        stream, positions, ends, adapter, table, wanted = self.workspace
        batch = RaggedBatch(
            tokens=stream[:tokens].to(device),
            positions=positions[:tokens].to(device),
            cu_seqlens=ends[: count + 1].to(device),
            adapter=adapter[:count].to(device),
            block_table=table[: count * blocks].view(count, blocks).to(device),
            host_lengths=lengths,
            host_adapter=adapters,
        )
        return batch, wanted[:rows]

    def fetch(self, adapter: int) -> tuple[int, str]:
        """`Shelf.fetch`, on another thread. What it raises is told to whoever asks, so where adapters lie is not in it;
        standard error has all of it."""
        try:
            return self.shelf.fetch(adapter)
        except Exception as error:
            print(f"warning: adapter: {error}", file=sys.stderr, flush=True)
            raise FtkitError(self.shelf.without_place(adapter, str(error))) from None

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
