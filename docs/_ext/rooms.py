"""Draw the rooms of the library: boxes on floors, and an arrow for each import between two rooms.

A room is a module or package directly in src/moebalance. `integrations` holds one room for each
framework. Imports inside a function count too: they run later, but they are needed all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

PACKAGE = "moebalance"
SPLIT = "integrations"

Imports = Mapping[str, frozenset[str]]
"""The rooms that each room imports."""


class Edge(NamedTuple):
    """An import from one room to another."""

    above: str
    below: str


def read_imports(package: Path) -> dict[str, frozenset[str]]:
    """The rooms of a package, and the rooms that each of them imports.

    The package's own `__init__.py` and `__main__.py` are no rooms: they only name what is there.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        if parts[0].startswith("__") or parts == (SPLIT, "__init__"):
            continue
        room = _room(parts)
        imported = _imported(ast.parse(file.read_text(encoding="utf-8")))
        found.setdefault(room, set()).update(_room(name.split(".")) for name in imported)
    return {room: frozenset((below & found.keys()) - {room}) for room, below in found.items()}


def floors(imports: Imports) -> list[list[str]]:
    """Rooms from the ground up: each stands one floor above the highest room that it imports.

    Raises:
        ValueError: some rooms import each other in a circle.
    """
    level: dict[str, int] = {}
    while len(level) < len(imports):
        ready = [r for r, below in imports.items() if r not in level and below <= level.keys()]
        if not ready:
            raise ValueError(f"In or above a circle: {sorted(imports.keys() - level.keys())}.")
        level |= {r: 1 + max((level[b] for b in imports[r]), default=-1) for r in ready}
    return [sorted(r for r in level if level[r] == n) for n in range(max(level.values()) + 1)]


def direct(imports: Imports) -> Iterator[Edge]:
    """Imports that no chain of other imports implies: the arrows worth drawing."""
    for room, below in imports.items():
        implied = set().union(*(_reach(imports, other) for other in below))
        yield from (Edge(room, other) for other in sorted(below - implied))


def _reach(imports: Imports, room: str) -> set[str]:
    """All rooms below a room."""
    return set().union(imports[room], *(_reach(imports, below) for below in imports[room]))


def _room(parts: Iterable[str]) -> str:
    """The room of a module, given its path inside the package."""
    first, *rest = parts
    return f"{first}.{rest[0]}" if first == SPLIT and rest else first


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names inside the package that a module imports; `from moebalance import x` gives `x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        inside = (name.partition(f"{PACKAGE}.") for name in names)
        yield from (name for before, _, name in inside if not before and name)


ON_THE_PATH = frozenset({"router", "gates", "routing", "core", "methods", "metrics"})
"""Rooms that a batch passes through on its way; docs/architecture.md."""

_WIDTH, _BOX, _HIGH, _FLOOR = 860, 172, 30, 74


class Spot(NamedTuple):
    """Where a room stands: the middle of its box, and its floor, 0 at the ground."""

    x: float
    floor: int


def place(imports: Imports) -> dict[str, Spot]:
    """Give each room a place: on its floor, in the order of the places of the rooms below it."""
    spots: dict[str, Spot] = {}
    for number, rooms in enumerate(floors(imports)):
        under = {room: [spots[below].x for below in imports[room]] for room in rooms}
        rooms.sort(key=lambda room: (sum(under[room]) / max(len(under[room]), 1), room))
        gap = _WIDTH / len(rooms)
        spots |= {room: Spot(gap * (n + 0.5), number) for n, room in enumerate(rooms)}
    return spots


def draw(imports: Imports) -> str:
    """The picture as SVG; the same text on every machine."""
    spots = place(imports)
    height = _FLOOR * (1 + max(spot.floor for spot in spots.values()))
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'aria-label="Rooms of moebalance on their floors; arrows are imports and lead down" '
        'font-family="system-ui,sans-serif" font-size="13" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#7b8794"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height}" rx="10" fill="#ffffff"/>',
        *(_arrow(spots[edge.above], spots[edge.below], height) for edge in direct(imports)),
        *(_box(room, spot, height) for room, spot in spots.items()),
        "</svg>",
    ]
    return "\n".join(rows) + "\n"


def _top(spot: Spot, height: float) -> float:
    return height - _FLOOR * (spot.floor + 0.5) - _HIGH / 2


def _arrow(above: Spot, below: Spot, height: float) -> str:
    start, end = _top(above, height) + _HIGH, _top(below, height) - 2
    bend = min((end - start) / 2, _FLOOR)
    return (
        f'<path d="M{above.x:.0f} {start:.0f}C{above.x:.0f} {start + bend:.0f} '
        f'{below.x:.0f} {end - bend:.0f} {below.x:.0f} {end:.0f}" fill="none" stroke="#7b8794" '
        'marker-end="url(#tip)"/>'
    )


def _box(room: str, spot: Spot, height: float) -> str:
    top = _top(spot, height)
    fill = "#cfe3f7" if room in ON_THE_PATH else "#f2f4f6"
    return (
        f'<rect x="{spot.x - _BOX / 2:.0f}" y="{top:.0f}" width="{_BOX}" height="{_HIGH}" rx="5" '
        f'fill="{fill}" stroke="#52606d"/>'
        f'<text x="{spot.x:.0f}" y="{top + _HIGH / 2 + 4.5:.1f}" fill="#1b1f24">'
        f"{escape(room)}</text>"
    )
