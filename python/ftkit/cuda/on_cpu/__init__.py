"""Runs kernels on the CPU, thread by thread, with every access checked: for tests; not part of a release.

    library = build([variant("swiglu", VALUE="bf16")])[0]
    report = library.launch("swiglu_forward", grid, [gate, up, y, count], schedule=1)
    assert not report.faults

g++ compiles the source against `include/on_cpu.h` with thread-sanitizer instrumentation, but links it to `runtime/`,
which so sees every load and store. Threads are fibers; shared memory and asynchronous copies are poisoned; races are
found by vector clocks. What is found: races, reads of what was never written or is still in flight, out of bounds,
writes to const, misalignment, divergence at barriers and warp operations, deadlocks. Not modelled: the order of
effects between blocks, and time.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ftkit.cuda.arguments import check, packed
from ftkit.cuda.source import Variant
from ftkit.errors import InputError

HERE = Path(__file__).parent
SCHEDULES = (0, 1, 2, 3)
"""In turn; a random warp runs ahead; the last warp runs ahead; random switches. See runtime/schedule.cpp."""
_FLAGS = ("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
_INCLUDE = re.compile(r'#include "(.*)"')
_KINDS = ("load shared", "store shared", "load global", "store global", "ldmatrix")


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("schedule", ctypes.c_uint),
        ("seed", ctypes.c_uint),
        ("traffic", ctypes.c_uint),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char * 48),
        ("detail", ctypes.c_char * 160),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_int32),
        ("pc", ctypes.c_uint64),
        ("other_pc", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Fault:
    """Something that a kernel must not do."""

    kind: str
    detail: str
    where: str
    """file:line"""
    other: str
    """file:line of the access it collides with; may be empty."""
    block: tuple[int, int, int]
    thread: int

    def __str__(self) -> str:
        against = f" (against {self.other})" if self.other else ""
        detail = f", {self.detail}" if self.detail else ""
        return f"{self.where}: {self.kind}{detail}{against}, block {self.block}, thread {self.thread}"


@dataclass(frozen=True)
class Traffic:
    """Accesses at one place of the source by whole warps."""

    where: str
    kind: str
    requests: int
    taken: int
    """Cycles of shared memory, or sectors of 32 bytes of global memory."""
    least: int
    """What the same bytes need at least."""
    bytes: int


@dataclass(frozen=True)
class Report:
    """What a launch did."""

    faults: list[Fault]
    counters: dict[str, int]
    traffic: list[Traffic]


class Library:
    """A compiled variant."""

    def __init__(self, variant: Variant, path: Path, prefix: str) -> None:
        self.variant, self.path, self._prefix = variant, path, prefix
        self._library = _load(path)

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        arguments: Sequence[Tensor | int | float],
        *,
        shared_bytes: int = 0,
        schedule: int = 0,
        seed: int = 0,
        traffic: bool = False,
    ) -> Report:
        """Runs kernel `name` to its end or to a fault that leaves no sense in going on.

        `grid` is (x, y, z), missing ones 1; arguments are checked against the kernel's parameters. `traffic` counts
        bank conflicts and sectors.
        """
        kernel = self.variant.kernels()[name]
        check(kernel, arguments, "cpu")
        tensors = [
            (argument, not parameter.constant)
            for parameter, argument in zip(kernel.parameters, arguments, strict=True)
            if isinstance(argument, Tensor)
        ]
        kept, pointers = packed(kernel, arguments)
        block = (kernel.threads, 1, 1)
        report = self.run(
            name,
            grid,
            block,
            pointers,
            tensors,
            shared_bytes=shared_bytes,
            schedule=schedule,
            seed=seed,
            traffic=traffic,
        )
        del kept
        return report

    def run(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        pointers: "ctypes.Array[ctypes.c_void_p]",
        tensors: Sequence[tuple[Tensor, bool]],
        *,
        shared_bytes: int = 0,
        schedule: int = 0,
        seed: int = 0,
        traffic: bool = False,
    ) -> Report:
        """The same with arguments as the driver takes them; only `tensors` may be touched, and written where true."""
        runtime = _runtime()
        runtime.on_cpu_reset()
        for tensor, writable in tensors:
            size = ctypes.c_size_t(tensor.numel() * tensor.element_size())
            runtime.on_cpu_buffer(ctypes.c_void_p(tensor.data_ptr()), size, int(writable))
        three, full = ctypes.c_uint * 3, (*grid, *(1,) * (3 - len(grid)))
        launch = _Launch(three(*full), three(*block), shared_bytes, schedule, seed, traffic)
        if getattr(self._library, self._prefix + name)(ctypes.byref(launch), pointers) < 0:
            raise InputError(
                f"{name}: expected at most 1024 threads and 227 KiB of shared memory, got {shared_bytes} bytes"
            )
        return self._report(runtime)

    def _report(self, runtime: ctypes.CDLL) -> Report:
        faults = (_Fault * 64)()
        count = min(runtime.on_cpu_faults(faults, 64), 64)
        rows = (ctypes.c_uint64 * 6 * 4096)()
        places = min(runtime.on_cpu_traffic(rows, 4096), 4096)
        counters = (ctypes.c_uint64 * 7)()
        runtime.on_cpu_counters(counters)
        wanted = {pc for fault in faults[:count] for pc in (fault.pc, fault.other_pc) if pc}
        wanted |= {row[0] for row in rows[:places]}
        where = _lines(self.path, sorted(wanted)) if wanted else {}
        names = ("accesses", "switches", "mma", "barriers", "ldmatrix", "loaded_bytes", "stored_bytes")
        return Report(
            [
                Fault(
                    fault.kind.decode(),
                    fault.detail.decode(),
                    where.get(fault.pc, ""),
                    where.get(fault.other_pc, ""),
                    tuple(fault.block),
                    fault.thread,
                )
                for fault in faults[:count]
            ],
            dict(zip(names, counters, strict=True)),
            [Traffic(where.get(row[0], ""), _KINDS[row[1]], *row[2:]) for row in rows[:places]],
        )


def build(variants: Sequence[Variant], cache: Path | None = None) -> list[Library]:
    """Compiles variants into one library: many small ones cost little more than one. Raises InputError without g++."""
    folder = _cache() if cache is None else cache
    digest = hashlib.sha256("".join(one.digest for one in variants).encode() + _own_digest().encode()).hexdigest()[:24]
    path = folder / f"kernels_{digest}.so"
    if not path.exists():
        _compile(
            path, _unit(variants), ("-O1", "-g1", "-fsanitize=thread", "-include", "on_cpu.h", f"-I{HERE / 'include'}")
        )
    return [Library(one, path, f"v{number}_") for number, one in enumerate(variants)]


def _unit(variants: Sequence[Variant]) -> str:
    """One translation unit: each variant, with the headers it includes, in a namespace of its own."""
    lines = ['#include "ptx.cuh"']
    for number, one in enumerate(variants):
        lines += [f"#define {name} {value}" for name, value in one.macros]
        lines += [f"namespace v{number} {{", _whole(one, f"{one.name}.cu", {"ptx.cuh"}), "}"]
        lines += [f"#undef {name}" for name, _ in one.macros]
        lines += [f"ON_CPU_ENTRY(v{number}::{name}, v{number}_{name})" for name in one.kernels()]
    return "\n".join(lines)


def _whole(variant: Variant, file: str, there: set[str]) -> str:
    """The file's text with what it includes in its place, each once, and with lines numbered as in the files."""
    texts = variant.headers() | {f"{variant.name}.cu": variant.text}
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate(texts[file].replace('extern "C"', "").splitlines(), 1):
        included = _INCLUDE.fullmatch(line)
        if included and included[1] not in there:
            there.add(included[1])
            lines += [_whole(variant, included[1], there), f'#line {number + 1} "{file}"']
        elif included or line == "#pragma once":
            lines.append("")
        else:
            lines.append(line)
    return "\n".join(lines)


def _compile(path: Path, text: str, flags: Sequence[str]) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise InputError("kernels on the CPU: expected g++ on the path, got none", "install it: apt install g++")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, parts = Path(folder) / path.name, Path(folder) / "parts.o"
        command = [compiler, *_FLAGS, *flags, "-c", "-x", "c++", "-", "-o", str(parts)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"kernels on the CPU: g++ refused {path.stem}\n{done.stderr[:4000]}")
        # linked apart, without -fsanitize=thread, or the sanitizer's own library would come along
        subprocess.run([compiler, "-shared", str(parts), "-o", str(made)], check=True)
        made.rename(path)


def _cache() -> Path:
    from ftkit.config.cache import cache_directory

    return cache_directory() / "on_cpu"


@functools.cache
def _own_digest() -> str:
    files = sorted(path for path in HERE.rglob("*") if path.suffix in (".h", ".cuh", ".cpp"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@functools.cache
def _runtime() -> ctypes.CDLL:
    path = _cache() / f"runtime_{_own_digest()[:24]}.so"
    if not path.exists():
        text = "\n".join(f'#include "{one}"' for one in sorted((HERE / "runtime").glob("*.cpp")))
        _compile(path, text, ("-O2",))
    return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    _runtime()  # first: it has what the kernels call
    return ctypes.CDLL(str(path))


def _lines(path: Path, places: Sequence[int]) -> dict[int, str]:
    """Address → file:line of the kernel's source, of the innermost call that stands there."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    base = next(int(line.split("-")[0], 16) for line in maps if line.endswith(str(path)))
    program = shutil.which("addr2line")
    if program is None:
        return {}
    command = [program, "-a", "-i", "-e", str(path), *(hex(place - base - 1) for place in places)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chains = re.split(r"^0x[0-9a-f]+\n", text, flags=re.MULTILINE)[1:]
    found = {}
    for place, chain in zip(places, chains, strict=True):
        frames = [frame.split(" ")[0].rsplit("/", 1)[-1] for frame in chain.splitlines()]
        ours = [frame for frame in frames if ".cu" in frame and not frame.startswith("ptx.cuh")]
        found[place] = ours[0] if ours else frames[0]
    return found
