"""Which block format each weight of a GGUF file gets: llama.cpp's names of the mixtures, and its rules.

Vectors (norms, biases) stay in f32. Embeddings and the output matrix decide most about quality and get 6 or 8 bits.
The mixtures `…_m` give more bits to `attn_v` and `ffn_down`, in the first and last eighth of the layers and every third
one between. A row that doesn't divide into blocks of 256 gets the format of about the same size with blocks of 32, and
one that doesn't divide into those stays in f16.

Source: llama.cpp's quantization mixtures (MIT licence), measured there by perplexity.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ftkit._core import quant_formats
from ftkit.errors import InputError, did_you_mean

_BLOCK_SIZES = {name: size for name, size, _ in quant_formats()}
_WITHOUT_SUPER_BLOCKS = {
    "q2_k": "iq4_nl",
    "q3_k": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
Raise = Callable[[str, int, int], str | None]
"""(part such as `attn_v`, layer, layers) → the format it gets instead of the base's, if another."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A type of file: the format of most matrices, and what differs."""

    base: str
    file_type: int
    """llama.cpp's number of the type, for people that look at a file's metadata."""
    raised: Raise = lambda part, layer, layers: None  # noqa: ARG005


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _medium(more: str) -> Raise:
    def raised(part: str, layer: int, layers: int) -> str | None:
        return more if part in ("attn_v", "ffn_down") and _more_bits(layer, layers) else None

    return raised


def _medium_3_bits(part: str, layer: int, layers: int) -> str | None:
    match part:
        case "attn_v":
            return "q5_k" if layer < 2 else "q4_k"
        case "ffn_down":
            return "q5_k" if layer < layers // 16 else "q4_k" if _more_bits(layer, layers) else None
        case "attn_output":
            return "q4_k"
        case _:
            return None


def _around_2_bits(part: str, layer: int, layers: int) -> str | None:  # noqa: ARG001
    return {"attn_v": "q4_k", "ffn_down": "q3_k", "attn_output": "q3_k"}.get(part)


TYPES = {
    "f32": Mixture(base="f32", file_type=0),
    "f16": Mixture(base="f16", file_type=1),
    "bf16": Mixture(base="bf16", file_type=32),
    "q8_0": Mixture(base="q8_0", file_type=7),
    "q6_k": Mixture(base="q6_k", file_type=18),
    "q5_k_m": Mixture(base="q5_k", file_type=17, raised=_medium("q6_k")),
    "q5_k_s": Mixture(base="q5_k", file_type=16),
    "q5_1": Mixture(base="q5_1", file_type=9),
    "q5_0": Mixture(base="q5_0", file_type=8),
    "q4_k_m": Mixture(base="q4_k", file_type=15, raised=_medium("q6_k")),
    "q4_k_s": Mixture(base="q4_k", file_type=14),
    "q4_1": Mixture(base="q4_1", file_type=3),
    "q4_0": Mixture(base="q4_0", file_type=2),
    "iq4_nl": Mixture(base="iq4_nl", file_type=25),
    "iq4_xs": Mixture(base="iq4_xs", file_type=30),
    "q3_k_m": Mixture(base="q3_k", file_type=12, raised=_medium_3_bits),
    "q3_k_s": Mixture(base="q3_k", file_type=11),
    "q2_k": Mixture(base="q2_k", file_type=10, raised=_around_2_bits),
}


def mixture(name: str) -> Mixture:
    """The type called `name`. Raises InputError, with the nearest known one, when there is none."""
    if name not in TYPES:
        raise InputError(f"--type: expected one of {', '.join(TYPES)}, got {name!r}", did_you_mean(name, TYPES))
    return TYPES[name]


def block_format(name: str, shape: tuple[int, ...], layers: int, mixture: Mixture) -> str:
    """The block format of the tensor `name` (GGUF's name) in a file of the type `mixture`."""
    if len(shape) < 2:
        return "f32"
    wanted = mixture.base
    quantized = _BLOCK_SIZES[wanted] > 1
    if name in ("token_embd.weight", "output.weight"):
        wanted = "q6_k" if quantized and wanted != "q8_0" else wanted
    elif block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        wanted = mixture.raised(block[2], int(block[1]), layers) or wanted
    if shape[-1] % _BLOCK_SIZES[wanted] != 0:
        wanted = _WITHOUT_SUPER_BLOCKS.get(wanted, "f16")
    return wanted if shape[-1] % _BLOCK_SIZES[wanted] == 0 else "f16"
