"""The Rust core, as Python sees it. `just check` holds this file against the module (stubtest)."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, final

from torch import Tensor

__version__: str

# plan

def replay(events: list[tuple[int, int, int]], categories: int) -> tuple[int, list[int], int, int]:
    """The peak of a trace of `(id, bytes, category)` lines: `(bytes, bytes by category, event index, bytes left)`.

    A line with `bytes >= 0` is a birth, one with `bytes < 0` the death of that id.
    Raises FtkitError for a trace that frees what does not live, or allocates what lives.
    """

# gguf
@final
class GgufFile:
    """An open, memory-mapped and checked GGUF file."""

    def __new__(cls, path: str | PathLike[str]) -> GgufFile: ...
    @property
    def metadata(self) -> dict[str, Any]:
        """Key → int, float, bool, str or list of these, in the file's order."""
    @property
    def metadata_types(self) -> dict[str, str]:
        """Key → `u32`, `string`, `[f32]` and so on, in the file's order."""
    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape in torch's order, block format such as `q4_1`), in the file's order."""
    def read(self, name: str, out: Tensor) -> None:
        """Writes a tensor's values to `out`: contiguous, on the CPU, same shape, float32, bfloat16 or float16.

        Raises InputError when there is no such tensor, the shape differs, or a value is NaN or infinite.
        """
    def read_blocks(self, name: str, out: Tensor) -> None:
        """Writes a tensor's blocks as they are to `out`: contiguous uint8, on the CPU, as many as it has bytes."""

@final
class GgufWriter:
    """Writes a GGUF file: all is declared when it is made, then the tensors follow in that order.

    The file is there, whole, when `finish` returns; before that, and after a failure, there is nothing.
    """

    def __new__(
        cls,
        path: str | PathLike[str],
        metadata: Sequence[tuple[str, str, Any]],
        tensors: Sequence[tuple[str, Sequence[int], str]],
        overwrite: bool = False,
    ) -> GgufWriter:
        """`metadata`: (key, type as in `GgufFile.metadata_types`, value); `tensors`: (name, shape, format).

        Raises InputError when the file exists, a key comes twice, or rows don't divide into the format's blocks.
        """
    def write(self, name: str, values: Tensor) -> None:
        """Quantizes float32, bfloat16 or float16 values, contiguous on the CPU, to the tensor's format."""
    def write_blocks(self, name: str, blocks: Tensor) -> None:
        """Writes the tensor's blocks as they are: contiguous uint8, on the CPU."""
    def finish(self) -> int:
        """Syncs the file, gives it its name, and returns its size in bytes."""
    def abandon(self) -> None:
        """Drops what was written so far."""

# quant
def quant_formats() -> list[tuple[str, int, int]]:
    """The block formats: (name, values in a block, bytes of a block)."""

def quantize(kind: str, values: Tensor, out: Tensor) -> None:
    """Writes float32, bfloat16 or float16 `values` as blocks of the format `kind` to `out` (uint8)."""

def dequantize(kind: str, blocks: Tensor, out: Tensor) -> None:
    """Writes the values of `blocks` (uint8, of the format `kind`) to `out` (float32)."""
