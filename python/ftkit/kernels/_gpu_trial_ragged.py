"""The trial's cases of kernels over ragged streams and pages, and of codes with offsets; see _gpu_trial.py."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ftkit.cuda import attention as attention_on_gpu
from ftkit.cuda import launches, lora
from ftkit.cuda.launch import Launch
from ftkit.cuda.lora import Matrices, Segments
from ftkit.cuda.pages import paged_prefill
from ftkit.kernels._gpu_trial import Case
from ftkit.kernels.attention import attention
from ftkit.kernels.coded_matmul import Coded, coded_dense
from ftkit.kernels.paged_attention import paged_attention

_RANK = 16


def cases(launch: Launch, device: str, size: int) -> Iterator[Case]:
    """The kernels over layers [size, size], a multiple of 128."""
    yield from _low_rank(launch, device, size)
    yield from _offsets(launch, device, size)
    yield _prompt(launch, device, size)
    yield from _sequences(launch, device, size)


def _sequences(launch: Launch, device: str, size: int) -> Iterator[Case]:
    """A training step's attention over two sequences, and its gradients."""
    random, heads, lengths = torch.Generator().manual_seed(5), 2, (size // 3, size - size // 3)
    q, dy = (torch.randn(size, heads, 128, generator=random).to(device, torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(size, 1, 128, generator=random).to(device, torch.bfloat16) for _ in range(2))
    ends, scale = torch.tensor([0, lengths[0], size], dtype=torch.int32, device=device), 128**-0.5
    y, m = torch.empty_like(q), q.new_empty(size, heads, dtype=torch.float32)

    def ours() -> Tensor:
        attention_on_gpu.forward(launch, q, k, v, ends, scale, None, y, m)
        return y

    def torchs() -> Tensor:
        return attention.reference(q, k, v, lengths, scale=scale)

    def ours_back() -> Tensor:
        gradients = [torch.empty_like(one) for one in (q, k, v)]
        attention_on_gpu.backward(launch, q, k, v, ends, scale, None, ours(), m, dy, *gradients)
        return torch.cat([one.flatten() for one in gradients])

    def torchs_back() -> Tensor:
        leaves = [one.detach().requires_grad_() for one in (q, k, v)]
        again = attention.reference(leaves[0], leaves[1], leaves[2], lengths, scale=scale)
        found = torch.autograd.grad(again, leaves, dy)
        return torch.cat([one.flatten() for one in found])

    yield Case("attention", ours, torchs, 3 * q.nbytes, 0.02)
    yield Case("attention", ours_back, torchs_back, 6 * q.nbytes, 0.02)


def _prompt(launch: Launch, device: str, size: int) -> Case:
    """A prompt of so many tokens on pages of 16."""
    random = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, torch.bfloat16)

    q, pages = normal(size, 2, 128), normal(size // 16, 1, 2, 16, 1, 128)
    table = torch.arange(size // 16, dtype=torch.int32, device=device).unsqueeze(0)
    ends, places = (torch.tensor(one, dtype=torch.int32, device=device) for one in ([0, size], list(range(size))))
    return Case(
        "paged_prefill",
        lambda: paged_prefill(launch, q, pages, table, ends, places, 0, 128**-0.5, None),
        lambda: paged_attention.reference(q, pages, table, ends, places, (size,), (size,), layer=0, scale=128**-0.5),
        q.nbytes * 2 + pages.nbytes,
        0.02,
    )


def _offsets(launch: Launch, device: str, size: int) -> Iterator[Case]:
    """Products with random codes, scales and offsets."""
    random = torch.Generator().manual_seed(3)

    def halves() -> Tensor:
        return (torch.randn(size, size // 64, generator=random) / size).half().to(device)

    codes = torch.randint(0, 256, (size, size // 2), dtype=torch.uint8, generator=random).to(device)
    table = torch.arange(16.0, device=device)
    coded = Coded(shape=(size, size), codes=codes, table=table, group=64, scales=halves(), offsets=halves())
    moved_bytes = codes.nbytes + 2 * coded.scales.nbytes
    for name, rows in (("coded_decode", 16), ("coded_forward", min(2048, size)), ("coded_dx", min(2048, size))):
        x = torch.randn(rows, size, generator=random).to(device, torch.bfloat16)
        ours, back = (launches.matmul_transposed, True) if name == "coded_dx" else (launches.matmul, False)

        def torchs(x: Tensor = x, back: bool = back) -> Tensor:
            dense = coded_dense.reference(coded).to(x.dtype)
            return x @ (dense if back else dense.T)

        yield Case(name, lambda ours=ours, x=x: ours(launch, x, coded), torchs, moved_bytes + 2 * x.nbytes, 0.02)  # type: ignore[misc]


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
