"""The drawing in docs/architecture.md is the code's: every arrow between rooms, none upward, no circle between files."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS, ARROWS = 24, 100
"""At most so many; each is something a newcomer has to learn."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for top in ("titan_dp", "kernels") for path in (ROOT / top).rglob("*.py")}
MODULES["train"] = ROOT / "train.py"
FRONTS = {"train": "train.py", "titan_dp.__main__": "cli"}
"""What is started lies where Python looks for it."""


def room_of(module: str) -> str:
    """A package or a single file of titan_dp/ by its name in the drawing."""
    if module in FRONTS:
        return FRONTS[module]
    first, *rest = module.split(".")
    return "deltaproduct_kernels" if first == "deltaproduct_kernels" else rest[0] if rest else "titan_dp"


def imports_of(module: str) -> set[str]:
    """Modules of the project that `module` imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & MODULES.keys()) - {module, "titan_dp"}


IMPORTS = {module: imports_of(module) for module in MODULES}


def arrows() -> dict[str, set[str]]:
    """Rooms each room imports."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, imported in IMPORTS.items():
        rooms[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module)}
    rooms.pop("titan_dp", None)
    return dict(rooms)


def drawn() -> dict[str, set[str]]:
    """The same as the page draws it: a row per room, `room` | what it is for | rooms it imports, from the top down."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    return {room.rstrip("/"): set(re.findall(r"[\w.]+", imported)) for room, imported in rows}


@pytest.mark.parametrize("room", sorted(arrows()))
def test_the_page_draws_every_import(room: str) -> None:
    assert drawn().get(room) == arrows()[room]


def test_no_arrow_runs_up() -> None:
    order = list(drawn())
    up = {
        f"{room} -> {other}" for room, others in arrows().items() for other in others if order.index(other) < order.index(room)
    }
    assert not up


def test_the_house_stays_small() -> None:
    # Rooms that are not drawn: benchmarks and the corpus; only the first has arrows of its own, to nearly every room.
    assert len(arrows()) <= ROOMS - 2
    assert sum(map(len, arrows().values())) <= ARROWS - 15


def test_no_files_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(IMPORTS[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
