"""NF4: 4-bit codes at the quantiles of a normal distribution, scales quantized twice; 4.13 bits, for QLoRA.

The 16 numbers split a normal distribution into parts of about equal probability, with an exact zero; see `_codebook`
for blocks, scales and sizes. Frozen matrices of the layers are held so; embeddings and the head stay dense. Choose it
to finetune adapters over a base in a quarter of its memory.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv 2305.14314.
"""

from ftkit.quant._codebook import OPTIONS, codebook
from ftkit.quant._scheme import Scheme

__all__ = ["OPTIONS", "scheme"]

# the published numbers: quantiles of the normal distribution between 1 - 0.9677083 and 0.9677083, by their greatest
_TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def scheme(option: str = "") -> Scheme:
    """The scheme; with `single`, scales are not quantized again."""
    return codebook("nf4", _TABLE, option)
