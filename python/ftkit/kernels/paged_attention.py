"""Causal attention of new tokens over the cache pages of their sequences.

For a token t with position p, over the positions s ≤ p of its sequence (s > p − window where there is a window):

    y_t = Σ_s softmax_s(scale · q_t · k_s) v_s

The cache is cut in pages of `[layers, 2, block_tokens, key_value_heads, head_dim]`: a layer's keys, then its values. A
sequence's token at position p is in slot p % block_tokens of page `block_table[sequence, p // block_tokens]`. Query
head h reads head h // (heads / key_value_heads). Keys and values of the new tokens are in their pages already.

The backends `cpu` (in the core) and `cuda` compute each row by itself: its result depends on its own sequence and on
nothing else in the batch. They read pages where they are, the core those of float32 and bfloat16; `cuda` has a kernel
of the tensor core's for long prompts. The reference copies each sequence's pages into one tensor and takes torch's
attention, which is faster for long prompts on the CPU.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from ftkit import _core
from ftkit.cuda import launches
from ftkit.cuda.pages import paged_prefill, takes_prefill
from ftkit.kernels import _gpu, allows, operation


@operation
def paged_attention(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    lengths: tuple[int, ...],
    totals: tuple[int, ...],
    *,
    layer: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """q [T, heads, head_dim], pages [pages, layers, 2, block_tokens, key_value_heads, head_dim] to q's shape.

    block_table i32 [N, blocks], cu_seqlens i32 [N + 1], positions i32 [T]; on the host: `lengths`, the new tokens of
    each sequence, and `totals`, its tokens with these. A window counts the token itself.
    """
    del cu_seqlens  # the lengths say the same
    block_tokens = pages.shape[3]
    keys, values = pages[:, layer, 0], pages[:, layer, 1]
    outputs, end = [], 0
    for sequence, (length, total) in enumerate(zip(lengths, totals, strict=True)):
        begin, end = end, end + length
        table = block_table[sequence, : -(-total // block_tokens)].long()
        k = keys[table].flatten(0, 1)[:total].transpose(0, 1)  # [key_value_heads, total, head_dim]
        v = values[table].flatten(0, 1)[:total].transpose(0, 1)
        seen = torch.arange(total, device=q.device)
        place = positions[begin:end].unsqueeze(1)
        mask = seen <= place  # [length, total]
        if window is not None:
            mask &= seen > place - window
        output = functional.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1).unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            attn_mask=None if length == 1 and window is None else mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[0],
        )
        outputs.append(output.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)  # [T, heads, head_dim]


FEW = 4
"""Sequences with at most as many new tokens are better off with the core, longer ones with torch's blocks."""


def _supports(q: Tensor, pages: Tensor, *_: object, **__: object) -> bool:
    numbers = q.dtype == pages.dtype and q.dtype in (torch.float32, torch.bfloat16)
    return numbers and q.device.type == "cpu" and pages.is_contiguous()


def _on_gpu(q: Tensor, pages: Tensor, *_: object, **__: object) -> bool:
    if q.device.type != _gpu.device_type or pages.device.type != _gpu.device_type:
        return False
    return launches.takes_attention(q, pages) or takes_prefill(q, pages)


def _by_tiles(q: Tensor, pages: Tensor, few: bool) -> bool:
    """Whether a kernel takes sequences of many tokens, or those of few that the kernel for these does not."""
    if q.device.type != _gpu.device_type or not allows("cuda") or not takes_prefill(q, pages):
        return False
    return not few or not launches.takes_attention(q, pages)


@paged_attention.backend("cuda", _on_gpu)
@paged_attention.backend("cpu", _supports)
def _few_by_themselves(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    lengths: tuple[int, ...],
    totals: tuple[int, ...],
    *,
    layer: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Sequences with few new tokens by the core or a kernel, neighbours in one call; long prompts by a kernel of their
    own or the reference."""
    outputs, first, begin = [], 0, 0
    for few, group in itertools.groupby(lengths, lambda length: length <= FEW):
        group_lengths = tuple(group)
        last, end = first + len(group_lengths), begin + sum(group_lengths)
        rows, table, ends = slice(begin, end), block_table[first:last], cu_seqlens[first : last + 1]
        ends = ends - begin if begin else ends
        if _by_tiles(q, pages, few):
            output = gpu_prefill(q[rows], pages, table, ends, positions[rows], layer, scale, window)
        elif few:
            output = torch.ops.ftkit.paged_attention(q[rows], pages, table, ends, positions[rows], layer, scale, window)
        else:
            output = paged_attention.reference(
                q[rows],
                pages,
                table,
                ends,
                positions[rows],
                group_lengths,
                totals[first:last],
                layer=layer,
                scale=scale,
                window=window,
            )
        outputs.append(output)
        first, begin = last, end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# What `torch.library.custom_op` does, in parts: the decorator's first call imports the compiler, which takes seconds.
_library = torch.library.Library("ftkit", "FRAGMENT")
_library.define(
    "paged_attention(Tensor q, Tensor pages, Tensor block_table, Tensor cu_seqlens, Tensor positions, int layer, "
    "float scale, int? window) -> Tensor"
)


def _compute(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    layer: int,
    scale: float,
    window: int | None,
) -> Tensor:
    q = q.contiguous()
    out = torch.empty_like(q)
    _core.paged_attention(q, pages, block_table, cu_seqlens, positions, out, layer, scale, window)
    return out


def _shape_of(
    q: Tensor,
    _pages: Tensor,
    _block_table: Tensor,
    _cu_seqlens: Tensor,
    _positions: Tensor,
    _layer: int,
    _scale: float,
    _window: int | None,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


gpu_prefill = _gpu.define(
    "gpu_paged_prefill(Tensor q, Tensor pages, Tensor block_table, Tensor cu_seqlens, Tensor positions, int layer, "
    "float scale, int? window) -> Tensor",
    lambda q, pages, table, ends, positions, *rest: paged_prefill(
        _gpu.launch, q.contiguous(), pages, table.contiguous(), ends.contiguous(), positions.contiguous(), *rest
    ),
    _shape_of,
)
_gpu.implement(
    "paged_attention",
    lambda q, pages, table, ends, positions, *rest: launches.paged_attention(
        _gpu.launch, q.contiguous(), pages, table.contiguous(), ends.contiguous(), positions.contiguous(), *rest
    ),
)
_library.impl("paged_attention", _compute, "CPU")
torch.library.register_fake("ftkit::paged_attention", _shape_of, lib=_library)
