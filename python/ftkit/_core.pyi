"""The Rust core, as Python sees it. `just check` holds this file against the module (stubtest)."""

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
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """(name, shape in torch's order, block format such as `q4_1`), in the file's order."""
    def read(self, name: str, out: Tensor) -> None:
        """Writes a tensor's values to `out`: contiguous, on the CPU, same shape, float32, bfloat16 or float16.

        Raises InputError when there is no such tensor, the shape differs, or a value is NaN or infinite.
        """
    def read_blocks(self, name: str, out: Tensor) -> None:
        """Writes a tensor's blocks as they are to `out`: contiguous uint8, on the CPU, as many as it has bytes."""
