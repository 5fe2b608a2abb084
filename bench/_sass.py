"""What the machine code of a kernel says without running it: its instructions, its main loop, how many blocks fit.

Needs `nvdisasm` (PyPI: nvidia-cuda-nvdisasm).
"""

import functools
import math
import operator
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path

from ftkit.cuda.compiler import Program, Use, compile_variant
from ftkit.cuda.source import Variant

_PLACE = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_FUNCTION = re.compile(r"\s*\.text\.(\w+):")
_SHARED, _GLOBAL = ("LDS", "STS", "LDSM", "LDGSTS"), ("LDG", "STG")
_INTEGER = {"LOP3", "PRMT", "SHF", "IADD3", "IADD", "VIADD", "LEA", "MOV", "SEL", "ISETP", "IMNMX", "VIMNMX", "PLOP3"}
_INTEGER |= {"FMNMX", "FSETP", "FSEL", "F2FP"}
"""What the pipe of whole numbers does, and with it comparisons and choices of fractions; IMAD is another's."""
_WIDTHS = {"64": 2, "128": 4, "2": 2, "4": 4}


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """What a streaming multiprocessor of an architecture holds."""

    registers: int = 65536
    threads: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(threads=2048, blocks=32, shared_bytes=164 << 10),
    "sm_86": Multiprocessor(threads=1536, blocks=16, shared_bytes=100 << 10),
    "sm_89": Multiprocessor(threads=1536, blocks=24, shared_bytes=100 << 10),
    "sm_90": Multiprocessor(threads=2048, blocks=32, shared_bytes=228 << 10),
    "sm_100": Multiprocessor(threads=2048, blocks=32, shared_bytes=228 << 10),
    "sm_120": Multiprocessor(threads=1536, blocks=24, shared_bytes=100 << 10),
}
_RESERVED_SHARED, _REGISTER_UNIT = 1024, 256


@dataclass(frozen=True)
class Loop:
    """The instructions of the shortest loop with the most products; without any, of the longest loop."""

    issued: int
    integer: int
    """Of these, what the pipe of whole numbers does."""
    loads: int
    """From global memory."""
    stores: int
    products: int
    """Of the tensor core: HMMA."""
    ldmatrix: int
    shared_clocks: int
    """That its accesses to shared memory take without bank conflicts."""
    global_clocks: int
    """That its accesses to global memory take of the first level of the cache."""

    def __add__(self, other: "Loop") -> "Loop":
        return Loop(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Code:
    """A kernel's machine code on an architecture."""

    use: Use
    instructions: Counter[str]
    loop: Loop | None
    passes: Loop | None
    """Over a row: the loop that loads most of those that store nothing, and of those that store."""
    whole: Loop
    """All of it, as if it were one round."""

    @property
    def local(self) -> int:
        """Loads from and stores to local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]


def blocks_that_fit(architecture: str, use: Use, threads: int) -> int:
    """Blocks of these threads that a multiprocessor holds at once."""
    holds, warps = MULTIPROCESSORS[architecture], -(-threads // 32)
    of_a_warp = math.ceil(use.registers * 32 / _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = holds.registers // of_a_warp // warps
    by_shared = holds.shared_bytes // (math.ceil(use.shared_bytes / 128) * 128 + _RESERVED_SHARED)
    return min(by_registers, by_shared, holds.threads // (32 * warps), holds.blocks)


def disassembler() -> str | None:
    """The path of nvdisasm."""
    found = shutil.which("nvdisasm")
    places = (Path(folder) / "nvidia" / "cu13" / "bin" / "nvdisasm" for folder in sys.path)
    return found or next((str(place) for place in places if place.exists()), None)


@functools.cache
def compiled(variant: Variant, architecture: str) -> Program:
    """The variant's program, compiled once."""
    return compile_variant(variant, architecture)


@functools.cache
def examine(variant: Variant, architecture: str) -> dict[str, Code]:
    """The machine code of each of the variant's kernels, by name."""
    program = compiled(variant, architecture)
    tool = disassembler()
    assert tool is not None, "expected nvdisasm, got none: pip install nvidia-cuda-nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    use = program.use()
    return {name: _code(lines, use[name]) for name, lines in _functions(text).items()}


def _functions(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := _FUNCTION.match(line):
            lines = found.setdefault(start[1], [])
        lines.append(line)
    return found


def _code(lines: list[str], use: Use) -> Code:
    code: list[tuple[str, str]] = []
    places: dict[str, int] = {}
    for line in lines:
        if place := _PLACE.match(line.strip()):
            places[place[1]] = len(code)
        one = _INSTRUCTION.match(line)
        # `@!PT` never runs: fillers against hazards
        if one and one[2] != "NOP" and (one[1] or "").strip() != "@!PT":
            code.append((one[2], one[3]))
    loops = []
    for end, (name, operands) in enumerate(code):
        target = re.search(r"(\.L_\w+)", operands) if name.startswith("BRA") else None
        if target and places.get(target[1], end) < end:
            loops.append(_loop([one for one, _ in code[places[target[1]] : end + 1]]))
    main = max(loops, key=lambda loop: (loop.products, -loop.issued if loop.products else loop.issued), default=None)
    reading, writing = ([one for one in loops if one.loads and bool(one.stores) == kind] for kind in (False, True))
    most = [max(ones, key=lambda loop: loop.loads) for ones in (reading, writing) if ones]
    names = [name for name, _ in code]
    over = functools.reduce(operator.add, most) if most else None
    return Code(use, Counter(name.split(".")[0] for name in names), main, over, _loop(names))


def _loop(names: list[str]) -> Loop:
    parts = [name.split(".") for name in names]
    kinds = Counter(words[0] for words in parts)

    def clocks(accesses: tuple[str, ...]) -> int:
        widths = ([_WIDTHS[word] for word in words[1:] if word in _WIDTHS] for words in parts if words[0] in accesses)
        return sum(max(one, default=1) for one in widths)

    integer = sum(kinds[name] for name in _INTEGER)
    products, ldmatrix = kinds["HMMA"], kinds["LDSM"]
    return Loop(len(names), integer, kinds["LDG"], kinds["STG"], products, ldmatrix, clocks(_SHARED), clocks(_GLOBAL))
