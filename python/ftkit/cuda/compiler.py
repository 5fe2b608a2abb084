"""Sources to machine code for a GPU, on the user's machine: NVRTC, which comes with torch's CUDA wheel; no nvcc.

What was compiled is kept in the cache by the hash of all that it depends on: the source, its headers and macros, the
compiler's version and flags, the architecture and the driver.
"""

import hashlib
import importlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.config.cache import cache_directory
from ftkit.cuda.source import Variant
from ftkit.errors import FtkitError, InputError

LEAST_ARCHITECTURE = 80
"""What the tensor core's bf16 and asynchronous copies need."""
_FLAGS = ("--std=c++17", "--ptxas-options=-v", "--no-source-include")
_USE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:, used \d+ barriers)?(?:, \d+ bytes cumulative stack size)?(?:, (\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Use:
    """What the assembler says that a kernel uses."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Program:
    """A compiled variant."""

    cubin: bytes
    ptx: str
    log: str

    def use(self) -> dict[str, Use]:
        """What each of its kernels uses, by name."""
        return {
            name: Use(int(registers), int(stack), int(stores) + int(loads), int(shared or 0))
            for name, stack, stores, loads, registers, shared in _USE.findall(self.log)
        }


def compile_variant(variant: Variant, architecture: str) -> Program:
    """Compiles for an architecture such as `sm_80`; needs no GPU and no driver.

    Raises InputError where NVRTC is missing or the architecture is not one of its, FtkitError with the compiler's
    words where it refuses the source.
    """
    nvrtc = _nvrtc()
    known = _architectures(nvrtc)
    number = re.fullmatch(r"sm_(\d+)[af]?", architecture)
    if number is None or int(number[1]) < LEAST_ARCHITECTURE:
        raise InputError(
            f"CUDA kernels: expected a GPU of sm_{LEAST_ARCHITECTURE} or newer, got {architecture}",
            "FTKIT_KERNELS=reference computes the same with torch's own kernels",
        )
    if int(number[1]) not in known:
        raise InputError(
            f"CUDA kernels: expected one of the compiler's architectures {known}, got {architecture}",
            "a newer torch brings a newer NVRTC",
        )
    texts = variant.headers()
    _, program = _call(
        nvrtc.nvrtcCreateProgram(
            variant.text.encode(),
            f"{variant.name}.cu".encode(),
            len(texts),
            [text.encode() for text in texts.values()],
            [name.encode() for name in texts],
        )
    )
    try:
        flags = [
            f"--gpu-architecture={architecture}",
            *_FLAGS,
            *(f"--ptxas-options={option}" for option in variant.assembler_options()),
            *(f"-D{name}={value}" for name, value in variant.macros),
        ]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        log = _text(nvrtc, program, "ProgramLog")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise FtkitError(f"{variant.name}.cu: NVRTC refused it for {architecture}\n{log[:4000]}")
        return Program(_text_bytes(nvrtc, program, "CUBIN"), _text(nvrtc, program, "PTX"), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def available() -> bool:
    """Whether there is a compiler; a GPU it doesn't need."""
    try:
        _nvrtc()
    except InputError:
        return False
    return True


def compiler_version() -> tuple[int, int]:
    """NVRTC's (major, minor). Raises InputError where there is none."""
    major, minor = _call(_nvrtc().nvrtcVersion())[1:]
    return major, minor


def cubin(variant: Variant, architecture: str, driver: str) -> bytes:
    """Machine code for this architecture, from the cache where it is there and whole."""
    key = "\0".join([variant.digest, architecture, driver, repr(compiler_version()), *_FLAGS])
    path = cache_directory() / "kernels" / f"{variant.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    found = _kept(path)
    if found is None:
        found = compile_variant(variant, architecture).cubin
        _keep(path, found)
    return found


def _kept(path: Path) -> bytes | None:
    """What is kept there, unless it is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _keep(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(hashlib.sha256(content).digest() + content)
    os.replace(name, path)


def _nvrtc() -> Any:
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"CUDA kernels: expected NVRTC, got none ({error})",
            "torch's CUDA wheel brings it; or: pip install cuda-bindings nvidia-cuda-nvrtc",
        ) from error
    return nvrtc


def _architectures(nvrtc: Any) -> list[int]:
    return list(_call(nvrtc.nvrtcGetSupportedArchs())[1])


def _call(answer: Any) -> Any:
    if int(answer[0]):
        raise FtkitError(f"NVRTC: expected success, got {answer[0]!r}")
    return answer


def _text_bytes(nvrtc: Any, program: Any, what: str) -> bytes:
    size: int = _call(getattr(nvrtc, f"nvrtcGet{what}Size")(program))[1]
    content = b" " * size
    _call(getattr(nvrtc, f"nvrtcGet{what}")(program, content))
    return content


def _text(nvrtc: Any, program: Any, what: str) -> str:
    return _text_bytes(nvrtc, program, what).rstrip(b"\0").decode()
