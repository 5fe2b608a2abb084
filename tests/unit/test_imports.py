"""The stair of rooms: imports in `python/ftkit` point downward, and the core knows no Python outside `src/py`."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "ftkit"
# A room may import from lower steps; rooms of one step import each other only where the step says so.
STAIR = [
    {"_core", "config", "errors", "plugins"},
    {"cuda"},
    {"kernels"},
    {"nn"},
    {"models", "quant", "adapters", "objectives", "optim"},
    {"train", "engine", "serve", "merge", "export", "eval", "recipes", "data", "plan"},
    {"cli"},
]
MAY_MEET = [{"_core", "config", "errors", "plugins"}, STAIR[5], {"cli"}]


def imports(path: Path) -> set[str]:
    """The rooms of ftkit that the file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "ftkit" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("ftkit.")}
    return found


def edges() -> set[tuple[str, str]]:
    """(room, imported room), for every import inside the package."""
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            found |= {(room, other) for other in imports(path) if other != room}
    return found


def step(room: str) -> int:
    """The step of the stair that the room stands on."""
    for index, rooms in enumerate(STAIR):
        if room in rooms:
            return index
    raise AssertionError(f"{room}: expected a room of the stair, {sorted(set().union(*STAIR))}")


def test_imports_point_downward() -> None:
    wrong = [
        f"{room} imports {other}"
        for room, other in sorted(edges())
        if step(other) > step(room)
        or (step(other) == step(room) and not any({room, other} <= group for group in MAY_MEET))
    ]
    assert not wrong


def test_rooms_of_one_step_do_not_import_in_a_circle() -> None:
    arrows = edges()
    reach = {room: {other for start, other in arrows if start == room} for room, _ in arrows}
    for _ in range(len(reach)):
        reach = {room: others.union(*(reach.get(other, set()) for other in others)) for room, others in reach.items()}
    assert not [room for room, others in reach.items() if room in others]


def test_the_core_knows_no_python_outside_py() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "src").rglob("*.rs")
        if "py" not in path.relative_to(ROOT / "src").parts[:1] and re.search(r"\bpyo3\b", path.read_text())
    ]
    assert not wrong
