"""Where to write a name beside each mark, so that names cover neither marks nor each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box closest to a point."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


class Anchor(NamedTuple):
    """A mark's centre, and the text to write beside it."""

    x: float
    y: float
    text: str


# A text further from its mark than this gets a line to it.
LEADER_FROM = 14.0
_HEIGHT = 15.0
_MARK = 7.0
_CROSSING = 200.0
_DIRECTIONS = [(math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16)]
_REACHES = (9.0, 14.0, 22.0, 34.0, 48.0, 66.0, 90.0, 120.0)


def place(
    anchors: Sequence[Anchor], obstacles: Sequence[Box], bounds: Box, *, letter: float = 6.6
) -> list[Box]:
    """A box for each text: near its mark, inside the bounds, over as little as possible.

    Every text tries sixteen directions at growing distances and takes the cheapest place given
    where the others stand, until none moves; the best of four orders of choosing is kept.

    Args:
        anchors: the marks with their texts.
        obstacles: what the texts should not cover (error bars, dots).
        bounds: the plot's area.
        letter: the mean width of a letter in pixels.
    """
    marks = [Box(a.x - _MARK, a.y - _MARK, a.x + _MARK, a.y + _MARK) for a in anchors]
    choices = [
        _choices(anchor, (*marks[:i], *marks[i + 1 :]), [marks[i], *obstacles], bounds, letter)
        for i, anchor in enumerate(anchors)
    ]
    starts = [list(range(len(anchors))), sorted(range(len(anchors)), key=lambda i: anchors[i].x)]
    settled = [
        _settle(anchors, choices, turns) for start in starts for turns in (start, start[::-1])
    ]
    return min(settled, key=lambda result: result[0])[1]


def leader(anchor: Anchor, box: Box) -> tuple[float, float] | None:
    """Where a line from the mark to its text ends, or None if the text is close enough."""
    x, y = box.nearest(anchor.x, anchor.y)
    return (x, y) if math.hypot(x - anchor.x, y - anchor.y) > LEADER_FROM else None


def _choices(
    anchor: Anchor, marks: Sequence[Box], obstacles: Sequence[Box], bounds: Box, letter: float
) -> list[tuple[float, Box]]:
    """Every place to try with what it costs whatever the other texts do, cheapest first."""
    width = letter * len(anchor.text)
    options = []
    for reach in _REACHES:
        for dx, dy in _DIRECTIONS:
            x, y = anchor.x + dx * reach, anchor.y + dy * (reach + _HEIGHT / 2)
            # Beside the mark the text starts there; above and below it is centred on it.
            left = x - width / 2 + dx * width / 2
            box = Box(left, y - _HEIGHT / 2, left + width, y + _HEIGHT / 2)
            cost = 50 * (width * _HEIGHT - box.overlap(bounds)) + 1.2 * reach
            cost += 4 * (1 - dx) + sum(6 * box.overlap(mark) for mark in marks)
            cost += sum(box.overlap(other) for other in obstacles)
            cost += sum(_CROSSING for mark in marks if _crosses(anchor, box, mark))
            options.append((cost, box))
    return sorted(options)


def _settle(
    anchors: Sequence[Anchor], choices: Sequence[Sequence[tuple[float, Box]]], turns: Sequence[int]
) -> tuple[float, list[Box]]:
    """Let the texts choose one after another until none moves; the total cost and the boxes."""
    chosen: dict[int, tuple[float, Box]] = {}
    for _ in range(6):
        before = dict(chosen)
        for i in turns:
            rivals = [(anchors[j], chosen[j][1]) for j in chosen if j != i]
            chosen[i] = _cheapest(anchors[i], choices[i], rivals)
        if chosen == before:
            break
    boxes = [chosen[i] for i in range(len(anchors))]
    return sum(cost for cost, _ in boxes), [box for _, box in boxes]


def _cheapest(
    anchor: Anchor, options: Sequence[tuple[float, Box]], rivals: Sequence[tuple[Anchor, Box]]
) -> tuple[float, Box]:
    best, least = options[0][1], math.inf
    for cost, box in options:
        if cost >= least:
            break
        for other, text in rivals:
            cost += 8 * box.overlap(text)
            cost += _CROSSING * (_crosses(anchor, box, text) + _crosses(other, text, box))
        if cost < least:
            best, least = box, cost
    return least, best


def _crosses(anchor: Anchor, box: Box, other: Box) -> bool:
    """Whether the line from a mark to its text runs through another box."""
    end = leader(anchor, box)
    if end is None:
        return False
    points = (
        (anchor.x + share * (end[0] - anchor.x), anchor.y + share * (end[1] - anchor.y))
        for share in (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
    )
    return any(other.left <= x <= other.right and other.top <= y <= other.bottom for x, y in points)
