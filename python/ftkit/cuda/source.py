"""The kernels' sources, which come with the package, and what can be read in them without compiling.

`NAME.cu` holds one kernel or a few that belong together; `include/` what they share, `on_gpu/` and `on_cpu/` what
differs. A source leaves types and sizes open as macros (`OUT`, `ROWS`, …): a `Variant` names a source and says what
they are.
"""

import functools
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from ftkit.errors import FtkitError

FOLDER = Path(__file__).parent
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(([^)]*)\)\s*)?(\w+)\s*\(([^)]*)\)")
_OPTION = re.compile(r"^// ptxas (-O\d):", re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Variant:
    """A source, and what its macros stand for."""

    name: str
    """The source is NAME.cu."""
    macros: tuple[tuple[str, str], ...] = ()
    changed: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """(file, text) of files that are others than ours, for tests that break them."""

    @property
    def text(self) -> str:
        """The source."""
        file = f"{self.name}.cu"
        return dict(self.changed)[file] if file in dict(self.changed) else read(file)

    def headers(self) -> dict[str, str]:
        """Name → text of what sources include, on a GPU."""
        return headers() | {name: text for name, text in self.changed if name.endswith(".cuh")}

    @property
    def digest(self) -> str:
        """SHA-256 of all that its meaning depends on."""
        parts = [self.name, repr(self.macros), self.text, *(f"{name}\n{text}" for name, text in self.headers().items())]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def kernels(self) -> "dict[str, Kernel]":
        """Its kernels by name."""
        return _kernels(self.text, self.macros)

    def assembler_options(self) -> list[str]:
        """What a comment `// ptxas -O1: why` says: for sources that the assembler's best leaves without registers."""
        return _OPTION.findall(self.text)

    def constant(self, name: str) -> int:
        """The value of `constexpr int NAME = …;` in the source, a whole number or a macro's."""
        found = re.search(rf"constexpr int {name} = (\w+);", self.text)
        if found is None:
            raise FtkitError(f"{self.name}.cu: expected constexpr int {name}, got none")
        return int(dict(self.macros).get(found[1], found[1]))


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel."""

    type: str
    """The C type, without const and *."""
    name: str
    pointer: bool
    constant: bool


@dataclass(frozen=True)
class Kernel:
    """What the source says of a kernel."""

    name: str
    threads: int
    """Of a block."""
    parameters: tuple[Parameter, ...]


def variant(name: str, **macros: object) -> Variant:
    """The variant with these macros."""
    return Variant(name, tuple((key, str(value)) for key, value in macros.items()))


def names() -> list[str]:
    """All sources' names."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


@functools.cache
def read(name: str) -> str:
    """The text of a file of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def headers() -> dict[str, str]:
    """Name → text of what sources include, on a GPU."""
    paths = (path for folder in ("include", "on_gpu") for path in sorted((FOLDER / folder).glob("*.cuh")))
    return {path.name: read(str(path.relative_to(FOLDER))) for path in paths}


@functools.cache
def _kernels(text: str, macros: tuple[tuple[str, str], ...]) -> dict[str, Kernel]:
    known = dict(macros)
    text = _COMMENT.sub("", text)
    constants = {name: known.get(value, value) for name, value in re.findall(r"constexpr int (\w+) = (\w+);", text)}
    found = {}
    for bounds, name, parameters in _KERNEL.findall(text):
        threads = bounds.split(",")[0].strip()
        threads = constants.get(threads, known.get(threads, threads))
        if not threads.isdigit():
            raise FtkitError(f"{name}: expected __launch_bounds__ with a known number of threads, got {bounds!r}")
        parsed = tuple(_parameter(one, known) for one in parameters.split(",") if one.strip())
        found[name] = Kernel(name, int(threads), parsed)
    return found


def _parameter(text: str, macros: dict[str, str]) -> Parameter:
    words = text.replace("*", " * ").replace("__restrict__", " ").split()
    *kind, name = words
    types = [macros.get(word, word) for word in kind if word not in ("*", "const")]
    return Parameter(" ".join(types), name, "*" in kind, "const" in kind)
