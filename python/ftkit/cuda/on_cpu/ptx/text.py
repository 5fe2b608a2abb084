"""PTX as text: its kernels, their instructions, and where their shared memory lies."""

import re
from dataclasses import dataclass, field

_KERNEL = re.compile(r"\.entry (\w+)\((.*?)\)[^{]*\{(.*?)\n\}", re.DOTALL)
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*(?:\.\w+)*)\s*(.*);")


@dataclass(frozen=True)
class Instruction:
    """One line, such as `@%p1 add.s32 %r1, %r2, 4;`."""

    predicate: str
    negated: bool
    words: list[str]
    operands: list[str]
    text: str


@dataclass
class Kernel:
    """What is between the braces of an entry."""

    name: str
    parameters: list[str]
    code: list[Instruction]
    labels: dict[str, int]
    shared: dict[str, int] = field(default_factory=dict)
    """Name → place."""
    shared_bytes: int = 0


def kernels_of(ptx: str) -> dict[str, Kernel]:
    """The kernels of a PTX text by name."""
    found = {}
    for name, parameters, body in _KERNEL.findall(ptx):
        kernel = Kernel(name, re.findall(r"\.param \.\w+ (\w+)", parameters), [], {})
        for line in body.splitlines():
            line = line.split("//")[0].strip()
            if declared := re.match(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", line):
                start = -(-kernel.shared_bytes // int(declared[1])) * int(declared[1])
                kernel.shared[declared[2]] = start
                kernel.shared_bytes = start + int(declared[3])
            elif label := re.match(r"(\$\w+):", line):
                kernel.labels[label[1]] = len(kernel.code)
            elif not line.startswith(".") and (one := _INSTRUCTION.match(line)):
                operands = [part.strip() for part in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)", one[4])]
                kernel.code.append(Instruction(one[2] or "", bool(one[1]), one[3].split("."), operands, line))
        found[name] = kernel
    return found
