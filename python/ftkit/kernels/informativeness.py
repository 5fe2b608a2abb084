"""How much of a sequence's attention goes to each of its blocks of tokens, for the queries of some blocks.

    I_mn = max over heads h and queries i of block m   Σ_{j in block n, j ≤ i} softmax_j(scale · q_ih · k_jh)

The attention is exact, but only for the blocks that are asked about and one key head at a time: no matrix of all tokens
by all tokens. A block that one head looks at from one token counts as much as one that all look at.

Source: after Wang et al., LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning, 2025, arXiv 2501.09767,
equation 2, which takes the largest score of a block before the softmax, averaged over heads.
"""

import torch
from torch import Tensor

from ftkit.kernels import operation

Anchor = tuple[int, int, int, int]
"""Of a block that asks: its first token in the stream and the one after its last, the first token of its sequence, and
that one's block."""


@operation
def informativeness(
    q: Tensor, k: Tensor, anchors: tuple[Anchor, ...], blocks: int, *, size: int, scale: float
) -> Tensor:
    """q [A, heads, head_dim], the queries of the `anchors` one after another, and k [T, key_value_heads, head_dim] to
    f32 [anchors, blocks]: zero in other sequences and later blocks. A sequence's blocks have `size` tokens from its
    first on; its last one may have fewer."""
    found = torch.zeros(len(anchors), blocks, dtype=torch.float32, device=q.device)
    group, row = q.shape[1] // k.shape[1], 0
    for number, (start, end, first, block) in enumerate(anchors):
        count, seen = end - start, end - first
        queries, row = q[row : row + count], row + count
        hidden = torch.ones(count, seen, dtype=torch.bool, device=q.device).triu(seen - count + 1)
        here = -(-seen // size)
        for head in range(k.shape[1]):
            keys = k[first:end, head]  # [seen, head_dim]
            scores = scale * (queries[:, head * group : (head + 1) * group] @ keys.t())  # [count, group, seen]
            scores = scores.float().masked_fill_(hidden.unsqueeze(1), float("-inf")).softmax(-1)
            shares = torch.nn.functional.pad(scores, (0, here * size - seen)).unflatten(-1, (here, size)).sum(-1)
            part = found[number, block : block + here]
            torch.maximum(part, shares.flatten(0, 1).amax(0), out=part)
    return found
