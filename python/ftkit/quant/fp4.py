"""FP4: 4-bit floating-point codes, scales quantized twice; 4.13 bits, for files that hold it.

A sign, two bits of exponent and one of fraction: 0, 0.0625, 2, 3, 4, 6, 8 and 12 by 12; see `_codebook` for blocks,
scales and sizes. On normally distributed weights its error is a third larger than that of `nf4`.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv 2305.14314.
"""

from ftkit.quant._codebook import OPTIONS, codebook
from ftkit.quant._scheme import Scheme

__all__ = ["OPTIONS", "scheme"]

_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def scheme(option: str = "") -> Scheme:
    """The scheme; with `single`, scales are not quantized again."""
    return codebook("fp4", (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)), option)
