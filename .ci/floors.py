"""The floors of the house: rooms and what they import, counted from the code; fails where it grows out of its plan.

    python .ci/floors.py            # the floors, from the top, and three numbers

A room is a file or a folder of src/s2d; benchmarks/ is one more. An arrow goes from a room to one that it imports,
wherever the import stands: in a function and for type checkers too. A room's floor is the longest chain of imports
below it, itself counted.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "s2d"
MOST_FLOORS, MOST_ARROWS, MOST_ROOT_FILES, MOST_LONG_FILES, LONG = 13, 140, 9, 2, 450


def room_of(file: Path) -> str:
    """The room that a file of the package, or of the benchmarks, belongs to."""
    if not file.is_relative_to(PACKAGE):
        return "benchmarks"
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The dotted names of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "s2d" and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "s2d" else [node.module]
            found |= set(names)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "s2d"}
    return found


def rooms() -> dict[str, set[str]]:
    """Every room with the rooms that it imports."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    known = {room_of(file) for file in files}
    house: dict[str, set[str]] = {room: set() for room in known}
    for file in files:
        for name in imported(file):
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 and parts[1] in known else "__init__"
            if target != room_of(file):
                house[room_of(file)].add(target)
    return house


def floors(house: dict[str, set[str]]) -> dict[str, int]:
    """The floor of every room, from 1; a circle is an error that names it."""

    @cache
    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            sys.exit(f"a circle of imports: {' -> '.join([*above[above.index(room) :], room])}")
        return 1 + max((floor(each, (*above, room)) for each in house[room]), default=0)

    return {room: floor(room) for room in house}


def complaints(house: dict[str, set[str]], found: dict[str, int]) -> list[str]:
    """What has grown out of the plan, a line each."""
    arrows = sum(map(len, house.values()))
    lines = []
    if max(found.values()) > MOST_FLOORS:
        lines.append(f"{max(found.values())} floors; at most {MOST_FLOORS}")
    if arrows > MOST_ARROWS:
        lines.append(f"{arrows} arrows; at most {MOST_ARROWS}")
    root = [file.name for file in PACKAGE.glob("*.py")]
    if len(root) > MOST_ROOT_FILES:
        lines.append(f"{len(root)} files at the root, at most {MOST_ROOT_FILES}: {', '.join(sorted(root))}")
    long = [file for file in PACKAGE.rglob("*.py") if len(file.read_text(encoding="utf-8").splitlines()) > LONG]
    if len(long) > MOST_LONG_FILES:
        lines.append(
            f"{len(long)} files above {LONG} lines, at most {MOST_LONG_FILES}: {', '.join(f.name for f in long)}"
        )
    return lines


def main() -> None:
    """Print the house from the top floor down; exit with 1 where it has grown out of its plan."""
    house = rooms()
    found = floors(house)
    for number in range(max(found.values()), 0, -1):
        here = sorted(room for room, floor in found.items() if floor == number)
        print(f"floor {number:2}  {'  '.join(here)}")
    print(f"{len(house)} rooms, {max(found.values())} floors, {sum(map(len, house.values()))} arrows, no circle")
    failed = complaints(house, found)
    print(*failed, sep="\n", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
