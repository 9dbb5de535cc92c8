"""Where to write a name next to each mark, so that names cover neither marks nor each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""Boxes are rows of left, bottom, right, top in pixels."""

HEIGHT, MARK, LEADER_FROM = 15.0, 7.0, 14.0
"""Of a line of text; from a mark's centre to its edge; distance from which a line leads there."""
_REACHES = (9.0, 14.0, 22.0, 34.0, 48.0, 66.0, 90.0, 120.0)
_ANGLES = np.arange(16) * np.pi / 8


def place(points: Array, widths: Sequence[float], obstacles: Array, bounds: Array) -> Array:
    """A box (N, 4) for each text: near its mark, inside the bounds, over as little as possible.

    Every text tries sixteen directions at growing distances and takes the cheapest place, given
    where the others stand, until none moves.

    Args:
        points: centres of the marks, (N, 2).
        widths: of the texts.
        obstacles: boxes that texts should not cover, (O, 4).
        bounds: the box of the plot, (4,).
    """
    marks = np.hstack([points - MARK, points + MARK])
    tries = [_around(point, width) for point, width in zip(points, widths, strict=True)]
    costs = []
    for i, boxes in enumerate(tries):
        area = (boxes[:, 2] - boxes[:, 0]) * HEIGHT
        outside = area - overlap(boxes, bounds[None])[:, 0]
        reach = np.repeat(_REACHES, len(_ANGLES))
        others = np.delete(marks, i, axis=0)
        costs.append(
            50 * outside
            + 1.2 * reach
            + 6 * overlap(boxes, others).sum(axis=1)
            + overlap(boxes, np.vstack([marks[i : i + 1], obstacles])).sum(axis=1)
            + 200 * _crossed(points[i], boxes, others)
        )
    chosen = np.array([boxes[cost.argmin()] for boxes, cost in zip(tries, costs, strict=True)])
    for _ in range(8):
        before = chosen.copy()
        for i, boxes in enumerate(tries):
            others = np.delete(chosen, i, axis=0)
            total = costs[i] + 8 * overlap(boxes, others).sum(axis=1)
            total += 200 * _crossed(points[i], boxes, others)
            chosen[i] = boxes[total.argmin()]
        if (chosen == before).all():
            break
    return chosen


def overlap(boxes: Array, others: Array) -> Array:
    """The area that each box shares with each other one, (N, M)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=-1))


def leader_end(point: Array, boxes: Array) -> Array:
    """The point of each box closest to a mark, (N, 2)."""
    return np.asarray(np.clip(point, boxes[:, :2], boxes[:, 2:]))


def _around(point: Array, width: float) -> Array:
    """The boxes to try, nearest first: to the side text starts at the mark, above it is centred."""
    reach, angle = (part.ravel() for part in np.meshgrid(_REACHES, _ANGLES, indexing="ij"))
    across, up = np.cos(angle), np.sin(angle)
    left = point[0] + across * reach + (across - 1) * width / 2
    bottom = point[1] + up * (reach + HEIGHT / 2) - HEIGHT / 2
    return np.stack([left, bottom, left + width, bottom + HEIGHT], axis=1)


def _crossed(point: Array, boxes: Array, others: Array) -> Array:
    """How many other boxes the line from the mark to each box runs through, (N,)."""
    end = leader_end(point, boxes)
    share = np.linspace(0.15, 0.9, 6)[:, None, None]
    line = point + share * (end - point)  # (6, N, 2)
    inside = (line[:, :, None] >= others[:, :2]) & (line[:, :, None] <= others[:, 2:])
    far = np.hypot(*(end - point).T) > LEADER_FROM
    return np.asarray(inside.all(axis=-1).any(axis=0).sum(axis=1) * far)
