"""The gated activation of a feed-forward layer: silu(gate) ⊙ up.

    y = gate / (1 + exp(−gate)) ⊙ up

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv 2002.05202.
"""

from torch import Tensor
from torch.nn import functional

from ftkit.kernels import operation


@operation
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up [tokens, intermediate] to the same shape."""
    return functional.silu(gate) * up
