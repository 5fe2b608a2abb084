"""Executes PTX, the text that NVRTC makes of a kernel: for what the C++ emulator can't see, such as inline assembly.

All threads of a block move together, one instruction at a time, those with the lowest place first: so paths that part
meet again. Registers are rows of 64 bits, one for each thread. Memory is checked for bounds and alignment, shared
memory is poisoned, asynchronous copies land when they are waited for; races are the other emulator's to find.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ftkit.cuda.on_cpu.ptx.block import Block
from ftkit.cuda.on_cpu.ptx.memory import Memory
from ftkit.cuda.on_cpu.ptx.text import Kernel, kernels_of

__all__ = ["kernels_of", "run"]


def run(kernel: Kernel, grid: Sequence[int], threads: int, arguments: Sequence[Tensor | int | float]) -> None:
    """Runs the kernel on all blocks of the grid (x, y). Raises FtkitError at the first fault."""
    memory = Memory([argument for argument in arguments if isinstance(argument, Tensor)])
    places = iter(memory.places)
    values = [
        next(places)
        if isinstance(one, Tensor)
        else int(np.float32(one).view(np.uint32))
        if isinstance(one, float)
        else one & (2**64 - 1)
        for one in arguments
    ]
    size = (*grid, *(1,) * (3 - len(grid)))
    for y in range(size[1]):
        for x in range(size[0]):
            Block(kernel, (x, y), size, threads, dict(zip(kernel.parameters, values, strict=True)), memory).run()
    memory.write_back()
