"""A block of threads on its way through PTX, all of them one instruction at a time."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ftkit.cuda.on_cpu.ptx.memory import Array, Memory
from ftkit.cuda.on_cpu.ptx.text import Instruction, Kernel
from ftkit.errors import FtkitError

_WARP = 32
_MMA = ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"]
_NUMPY = {"pred": np.dtype(bool)} | {
    f"{kind}{bits}": np.dtype(f"{'uif'['usf'.index(kind if kind in 'sf' else 'u')]}{bits // 8}")
    for kind in "usfb"
    for bits in (8, 16, 32, 64)
    if kind != "f" or bits > 8
}
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # true of NaN, too
    "leu": lambda a, b: ~(a > b),
    "geu": lambda a, b: ~(a < b),
}
_TWO: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
}
_ONE: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs,
    "neg": np.negative,
    "not": np.invert,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": np.reciprocal,
    "ex2": np.exp2,
}


class Block:
    """Registers are rows of 64 bits, one for each thread."""

    def __init__(
        self,
        kernel: Kernel,
        index: tuple[int, int],
        size: Sequence[int],
        threads: int,
        parameters: dict[str, int],
        memory: Memory,
    ) -> None:
        self.kernel, self.threads, self.parameters, self.memory = kernel, threads, parameters, memory
        self.shared = np.full(kernel.shared_bytes, 0xFF, np.uint8)
        self.registers: dict[str, Array] = {}
        self.copies: list[list[tuple[Array, Array]]] = [[]]
        numbers = np.arange(threads, dtype=np.uint64)
        self.special: dict[str, Any] = {
            "%tid.x": numbers,
            "%laneid": numbers % _WARP,
            "%ctaid.x": index[0],
            "%ctaid.y": index[1],
            "%ntid.x": threads,
            "%nctaid.x": size[0],
            "%nctaid.y": size[1],
        }

    def run(self) -> None:
        place, alive = np.zeros(self.threads, np.int64), np.ones(self.threads, bool)
        with np.errstate(all="ignore"):
            while alive.any():
                now = place[alive].min()
                here = alive & (place == now)
                one = self.kernel.code[now]
                place[here] += 1
                if one.predicate:
                    here = here & (self.get(one.predicate, "pred") != one.negated)
                    if not here.any():
                        continue
                if one.words[0] == "bra":
                    place[here] = self.kernel.labels[one.operands[0]]
                elif one.words[0] in ("ret", "exit"):
                    alive &= ~here
                elif one.words[0] in ("bar", "barrier"):
                    self.expect(bool((here == alive).all()), "a barrier that not all threads reach", one)
                else:
                    self.step(one, here)

    def expect(self, true: bool, what: str, one: Instruction) -> None:
        if not true:
            raise FtkitError(f"{what}: {one.text}")

    def expect_whole_warps(self, one: Instruction, here: Array) -> None:
        lanes = here.reshape(-1, _WARP)
        self.expect(bool((lanes.all(1) | ~lanes.any(1)).all()), "a part of a warp", one)

    def get(self, name: str, kind: str) -> Array:
        """An operand's value for all threads."""
        if name in self.registers:
            raw = self.registers[name]
        elif name in self.special:
            raw = np.broadcast_to(np.asarray(self.special[name], np.uint64), self.threads)
        elif name.startswith("%"):
            raw = np.zeros(self.threads, np.uint64)  # never written: what it holds cannot matter
        elif name in self.kernel.shared:
            raw = np.full(self.threads, self.kernel.shared[name], np.uint64)
        else:
            number = int(name[2:], 16) if name[:2] == "0f" else int(name.removesuffix("U"), 0)
            raw = np.full(self.threads, number & (2**64 - 1), np.uint64)
        if kind == "pred":
            return raw.astype(bool)
        dtype = _NUMPY[kind]
        return raw.astype(f"u{dtype.itemsize}").view(dtype)

    def put(self, name: str, value: Array, kind: str, here: Array) -> None:
        """Writes a register of the threads that are here."""
        if name == "_":
            return
        dtype = _NUMPY[kind]
        raw = np.ascontiguousarray(np.broadcast_to(value, self.threads)).astype(dtype)
        bits = raw if kind == "pred" else raw.view(f"u{dtype.itemsize}")
        before = self.registers.get(name)
        wide = bits.astype(np.uint64)
        self.registers[name] = wide if before is None else np.where(here, wide, before)

    def places(self, operand: str) -> Array:
        """The addresses that an operand such as [%rd1+16] stands for."""
        found = re.fullmatch(r"\[(\S+?)(?:\+(-?\d+))?\]", operand)
        assert found is not None, operand
        return self.get(found[1], "b64").astype(np.int64) + int(found[2] or 0)

    def bytes_of(self, space: str, starts: Array, count: int, one: Instruction) -> tuple[Array, Array]:
        """Where each of the addresses' bytes lie, [threads here, count], and the memory they lie in."""
        self.expect(bool((starts % count == 0).all()), "misaligned", one)
        places = starts[:, None] + np.arange(count)
        if space == "shared":
            inside = places.size == 0 or (places.min() >= 0 and places.max() < len(self.shared))
            self.expect(bool(inside), "out of bounds of shared memory", one)
            return places, self.shared
        self.memory.check(places, one.text)
        return places, self.memory.bytes

    def step(self, one: Instruction, here: Array) -> None:
        """Any instruction that only computes."""
        words, operands = one.words, one.operands
        name, kind = words[0], words[-1]
        if name == "ld" and words[1] == "param":
            parameter = operands[1].strip("[]")
            self.put(operands[0], np.full(self.threads, self.parameters[parameter], np.uint64), "u64", here)
        elif name in ("ld", "st"):
            self.load_or_store(one, here)
        elif name == "cp":
            self.copy_async(one, here)
        elif name == "mma":
            self.mma(one, here)
        elif name == "ldmatrix":
            self.ldmatrix(one, here)
        elif name == "shfl":
            self.expect_whole_warps(one, here)
            self.expect(words[2] in ("bfly", "idx"), "a shuffle that is not known here", one)
            lanes, other = np.arange(self.threads), self.get(operands[2], "u32").astype(np.int64)
            lanes = lanes ^ other if words[2] == "bfly" else lanes // _WARP * _WARP + other % _WARP
            self.put(operands[0].split("|")[0], self.get(operands[1], "b32")[lanes], "b32", here)
        elif name == "cvt":
            self.convert(one, here)
        elif name == "mov" and "{" in operands[0] + operands[1]:
            self.pack_or_unpack(one, here)
        elif name in ("mov", "cvta"):
            self.put(operands[0], self.get(operands[1], kind), kind, here)
        elif name == "setp":
            unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(words[1], words[1])
            found = _COMPARE[unsigned](self.get(operands[1], kind), self.get(operands[2], kind))
            self.put(operands[0], found, "pred", here)
        elif name == "selp":
            a, b = self.get(operands[1], kind), self.get(operands[2], kind)
            self.put(operands[0], np.where(self.get(operands[3], "pred"), a, b), kind, here)
        elif name == "prmt":
            self.permute_bytes(one, here)
        elif name == "bfi":
            a, b = self.get(operands[1], kind), self.get(operands[2], kind)
            mask = np.array(((1 << int(operands[4])) - 1) << int(operands[3]), b.dtype)
            self.put(operands[0], b & ~mask | a << np.array(int(operands[3]), a.dtype) & mask, kind, here)
        else:
            self.arithmetic(one, here)

    def arithmetic(self, one: Instruction, here: Array) -> None:
        words, operands = one.words, one.operands
        name, kind = words[0], words[-1]
        known = {"rn", "lo", "hi", "wide", "approx", "ftz"} | ({"rm"} if name == "fma" else set())
        self.expect(set(words[1:-1]) <= known, "a way to compute that is not known here", one)
        if name in _ONE:
            self.put(operands[0], _ONE[name](self.get(operands[1], kind)), kind, here)
            return
        a = self.get(operands[1], kind)
        if name in ("shl", "shr"):
            by = self.get(operands[2], "u32").astype(a.dtype)
            self.put(operands[0], np.left_shift(a, by) if name == "shl" else np.right_shift(a, by), kind, here)
            return
        b = self.get(operands[2], kind)
        if name in ("mul", "mad") and words[1] in ("wide", "hi"):
            self.expect(kind[1:] != "64", "a product of 128 bits", one)
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            a, b = a.astype(_NUMPY[wide]), b.astype(_NUMPY[wide])
            if words[1] == "hi":
                self.expect(name == "mul", "mad.hi is not known", one)
                self.put(operands[0], (a * b) >> np.array(int(kind[1:]), _NUMPY[wide]), kind, here)
                return
            kind = wide
        if name == "mad":
            self.put(operands[0], a * b + self.get(operands[3], kind), kind, here)
        elif name == "fma":
            exact = a.astype(np.float64) * b + self.get(operands[3], kind)
            found = exact.astype(np.float32)
            if words[1] == "rm":
                found = np.where(found > exact, np.nextafter(found, np.float32(-np.inf)), found)
            self.put(operands[0], found, kind, here)
        elif name in ("div", "rem") and kind != "f32":  # toward zero; blocks of zeros divide by no zero
            whole = np.where(b == 0, 0, np.abs(a) // np.where(b == 0, 1, np.abs(b))).astype(a.dtype)
            whole = np.where((a < 0) != (b < 0), -whole, whole) if kind[0] == "s" else whole
            self.put(operands[0], whole if name == "div" else a - whole * b, kind, here)
        elif name == "div":
            self.put(operands[0], a / b, kind, here)
        elif name in _TWO:
            self.put(operands[0], _TWO[name](a, b), kind, here)
        else:
            raise FtkitError(f"PTX that is not known here: {one.text}")

    def load_or_store(self, one: Instruction, here: Array) -> None:
        kind = one.words[-1]
        to_register, address = one.words[0] == "ld", one.operands[one.words[0] == "ld"]
        names = one.operands[not to_register].strip("{}").replace(" ", "").split(",")
        dtype = _NUMPY[kind]
        starts = self.places(address)[here]
        places, memory = self.bytes_of(one.words[1], starts, dtype.itemsize * len(names), one)
        if to_register:
            found = np.ascontiguousarray(memory[places]).view(dtype)  # [threads here, names]
            for number, name in enumerate(names):
                value = np.zeros(self.threads, dtype)
                value[here] = found[:, number]
                self.put(name, value, kind, here)
        else:
            values = np.stack([self.get(name, kind)[here] for name in names], 1)
            memory[places] = np.ascontiguousarray(values).view(np.uint8)

    def copy_async(self, one: Instruction, here: Array) -> None:
        if one.words[2] == "commit_group":
            self.copies.append([])
        elif one.words[2] == "wait_group":
            while len(self.copies) - 1 > int(one.operands[0]):
                for places, content in self.copies.pop(0):
                    self.shared[places] = content
        else:
            count = int(one.operands[2])
            taken = self.get(one.operands[3], "u32")[here] if len(one.operands) > 3 else np.full(here.sum(), count)
            to, _ = self.bytes_of("shared", self.places(one.operands[0])[here], count, one)
            content = np.zeros(to.shape, np.uint8)
            for wanted in np.unique(taken[taken > 0]):
                rows = taken == wanted
                starts = self.places(one.operands[1])[here][rows]
                places, memory = self.bytes_of("global", starts, int(wanted), one)
                content[rows, : int(wanted)] = memory[places]
            self.shared[to] = 0xFF
            self.copies[-1].append((to, content))

    def mma(self, one: Instruction, here: Array) -> None:
        """m16n8k16 of bf16: see on_gpu/ptx.cuh for the fragments."""
        self.expect_whole_warps(one, here)
        self.expect(one.words[3:] == _MMA, "an mma of another shape or type", one)
        d, a, b, c = ([name.strip() for name in part.strip("{}").split(",")] for part in one.operands)
        g, q = np.arange(_WARP) // 4, np.arange(_WARP) % 4
        warps = self.threads // _WARP
        left, right = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
        for h in range(2):
            for i, name in enumerate(a):
                left[:, g + 8 * (i % 2), 2 * q + h + 8 * (i // 2)] = self.half_of(name, h).reshape(warps, _WARP)
            for i, name in enumerate(b):
                right[:, 2 * q + h + 8 * i, g] = self.half_of(name, h).reshape(warps, _WARP)
        sums = np.zeros((warps, 16, 8), np.float32)
        for k in range(16):  # the order of the other emulator
            sums += left[:, :, k, None] * right[:, None, k, :]
        for i, (to, name) in enumerate(zip(d, c, strict=True)):
            found = sums[:, g + 8 * (i // 2), 2 * q + i % 2].reshape(-1)
            self.put(to, self.get(name, "f32") + found, "f32", here)

    def ldmatrix(self, one: Instruction, here: Array) -> None:
        """Four matrices: see on_gpu/ptx.cuh for where their numbers go."""
        self.expect_whole_warps(one, here)
        words = [word for word in one.words if word != "trans"]
        expected = ["ldmatrix", "sync", "aligned", "m8n8", "x4", "shared", "b16"]
        self.expect(words == expected, "matrices of another shape or type", one)
        starts = np.where(here, self.places(one.operands[1]), 0)
        places, memory = self.bytes_of("shared", starts, 16, one)
        matrices = (
            np.ascontiguousarray(memory[places]).view(np.uint16).reshape(-1, 4, 8, 8)
        )  # [warps, 4, rows, columns]
        if "trans" in one.words:
            matrices = matrices.swapaxes(2, 3)
        found = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(matrices), 4, _WARP)
        for number, name in enumerate(one.operands[0].strip("{}").replace(" ", "").split(",")):
            self.put(name, found[:, number].reshape(-1), "u32", here)

    def half_of(self, name: str, half: int) -> Array:
        """bf16 in a half of a register, as float32."""
        bits = self.get(name, "u32") >> np.uint32(16 * half) & np.uint32(0xFFFF)
        return (bits << np.uint32(16)).view(np.float32)

    def convert(self, one: Instruction, here: Array) -> None:
        words, operands = one.words, one.operands
        kind, source = words[-2], words[-1]
        self.expect(set(words[1:-2]) <= {"rn", "sat"}, "a rounding that is not known here", one)
        if kind == "bf16x2":
            high, low = (_bf16(self.get(name, source)) for name in operands[1:])
            self.put(operands[0], high << np.uint32(16) | low, "u32", here)
        elif kind == "bf16":
            self.put(operands[0], _bf16(self.get(operands[1], source)), "u16", here)
        else:
            value = self.get(operands[1], source)
            if "sat" in words:
                value = np.clip(value, 0, 1)
            self.put(operands[0], value.astype(_NUMPY[kind]), kind, here)

    def pack_or_unpack(self, one: Instruction, here: Array) -> None:
        """Between a register and halves of it, the lower one first."""
        to, source = ([name.strip() for name in part.strip("{}").split(",")] for part in one.operands)
        whole = _NUMPY[one.words[-1]]
        part = f"b{8 * whole.itemsize // max(len(to), len(source))}"
        if len(to) == 1:
            parts = np.stack([self.get(name, part) for name in source], 1)
            self.put(to[0], parts.view(whole)[:, 0], one.words[-1], here)
        else:
            parts = self.get(source[0], one.words[-1])[:, None].view(_NUMPY[part])
            for number, name in enumerate(to):
                self.put(name, parts[:, number], part, here)

    def permute_bytes(self, one: Instruction, here: Array) -> None:
        a, b, chosen = (self.get(name, "u32") for name in one.operands[1:])
        pool = np.stack([a, b], 1).view(np.uint8)  # [threads, 8]
        found = np.empty((self.threads, 4), np.uint8)
        for number in range(4):
            place = chosen >> np.uint32(4 * number)
            byte = pool[np.arange(self.threads), place & np.uint32(7)]
            found[:, number] = np.where(place & np.uint32(8), (byte >> np.uint8(7)) * np.uint8(255), byte)
        self.put(one.operands[0], found.view(np.uint32)[:, 0], "u32", here)


def _bf16(value: Array) -> Array:
    """The nearest bf16's bits, ties to even, uint32."""
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint32)
