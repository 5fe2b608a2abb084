"""A side of a benchmark in a process of its own: neither its memory nor its threads are the other's."""

import multiprocessing
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

from bench._figures import openmp_as_it_comes
from ftkit.train import heap
from ftkit.train.memory import peak_rss_bytes

Build = Callable[..., Callable[[int], Any]]


class Side:
    """A process that makes a step when it is told to: `build(*arguments)` is called there, and gives what does the step
    of a number. Ours has a training process' heap, a peer's OpenMP waits as it does by itself."""

    def __init__(self, build: Build, *arguments: Any, peer: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(build, arguments, peer, other), daemon=True)
        with openmp_as_it_comes() if peer else nullcontext():
            self._process.start()
        self._pipe.recv()  # ready

    def step(self, number: int) -> tuple[float, Any]:
        """(seconds, what the step gives)"""
        self._pipe.send(number)
        seconds, found = self._pipe.recv()
        return seconds, found

    def close(self) -> float:
        """The process' peak memory in MiB."""
        self._pipe.send(None)
        peak: float = self._pipe.recv()
        self._process.join()
        return peak


def _work(build: Build, arguments: tuple[Any, ...], peer: bool, pipe: Connection) -> None:
    if not peer:
        heap.settle()  # as `ftkit train` does
    step = build(*arguments)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        found = step(number)
        pipe.send((time.perf_counter() - start, found))
    pipe.send(peak_rss_bytes() / 2**20)
