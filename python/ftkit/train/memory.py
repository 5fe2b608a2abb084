"""What a run takes: tensor storage, counted exactly over a step, and the process' memory as the system counts it."""

import ctypes
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from ftkit.plan.budget import available_bytes, parse_bytes
from ftkit.plan.recorder import Recorder

Result = TypeVar("Result")
ELSEWHERE = "elsewhere"


class NoRoom(MemoryError):
    """The run would take more than it may; nothing has failed yet."""


def peak_bytes_of(
    run: Callable[[], Result], held: Mapping[str, Iterable[torch.Tensor]], device: torch.device
) -> tuple[Result, int]:
    """Runs something and counts the most bytes of tensors alive at once; `held` are those alive before, by category
    (`ELSEWHERE`: those that lie on disk)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return run(), torch.cuda.max_memory_allocated(device)
    recorder = Recorder()
    for category, tensors in held.items():
        if category == ELSEWHERE:
            recorder.elsewhere(tensors)
        else:
            recorder.adopt(tensors, category)
    with recorder:
        result = run()
    return result, recorder.peak().bytes


def room(budget: str | None, device: torch.device) -> int:
    """The bytes that a run on the device may take in all: the budget, or else what it has and what is free."""
    if budget is not None:
        return parse_bytes(budget)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_bytes() + rss_bytes()


def is_exhausted(error: BaseException) -> bool:
    """Whether something failed for want of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def keep_below(limit: int, more: int) -> None:
    """Gives freed memory back to the system where the process could exceed `limit` bytes with `more` on top.

    The C library keeps what was freed, and batches of other lengths do not fit where the last one was. Faulting the
    pages in again costs a few percent of a step, which is why it isn't done each time.
    """
    if _trim is not None and rss_bytes() + more > limit:
        _trim(0)


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # of glibc alone


def rss_bytes() -> int:
    """The process' memory now, where the system tells it, else its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return peak_rss_bytes()
    return pages * resource.getpagesize()


def peak_rss_bytes() -> int:
    """The most memory that the process has had."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    # on Linux this would count what the parent had, too, where a child begins life in its parent's memory (vfork)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
