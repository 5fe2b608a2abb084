"""The trial's cases of kernels over ragged streams and pages; see _gpu_trial.py."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ftkit.cuda import lora
from ftkit.cuda.launch import Launch
from ftkit.cuda.lora import Matrices, Segments
from ftkit.kernels._gpu_trial import Case

_RANK = 16


def cases(launch: Launch, device: str, size: int) -> Iterator[Case]:
    """The kernels over layers [size, size], a multiple of 128."""
    yield from _low_rank(launch, device, size)


def _low_rank(launch: Launch, device: str, size: int) -> Iterator[Case]:
    """Four adapters, of which two have rows: one row each, or many."""
    random = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    adapters, values = 4, _RANK * size
    pool, factors = normal(2 * adapters * values) / size**0.5, torch.ones(adapters, device=device)
    ranks = torch.full((adapters,), _RANK, dtype=torch.int32, device=device)
    places = torch.arange(2 * adapters, device=device).view(2, adapters) * values
    a, b = (Matrices(pool=pool, places=one, ranks=ranks, width=_RANK) for one in places)

    def under(lengths: list[int]) -> Segments:
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        return Segments(ends=ends.to(device), adapters=torch.tensor([1, 3], dtype=torch.int32, device=device))

    for name, each, tiles in (("lora_bgmv", 1, False), ("lora_sgmv", min(size // 2, 1024), True)):
        segments, x = under([each, each]), normal(2 * each, size).bfloat16()

        def ours(x: Tensor = x, segments: Segments = segments, tiles: bool = tiles) -> Tensor:
            y = torch.zeros_like(x)
            lora.expand(launch, lora.shrink(launch, x, a, factors, segments, tiles), b, segments, y, tiles)
            return y

        def torchs(x: Tensor = x) -> Tensor:
            matrices = pool.bfloat16().view(2 * adapters, -1)
            parts = zip((1, 3), x.chunk(2), strict=True)
            return torch.cat(
                [(one @ matrices[n].view(_RANK, -1).T) @ matrices[4 + n].view(-1, _RANK).T for n, one in parts]
            )

        yield Case(name, ours, torchs, 4 * values * pool.element_size() + 3 * x.nbytes, 0.02)
    low = normal(len(x), _RANK).bfloat16()
    yield Case(
        "lora_gradient",
        lambda: lora.gradient(launch, low, x, ranks, segments)[[1, 3]],
        lambda: torch.stack([left.T @ right for left, right in zip(low.chunk(2), x.chunk(2), strict=True)]),
        x.nbytes + low.nbytes,
        0.02,
    )
