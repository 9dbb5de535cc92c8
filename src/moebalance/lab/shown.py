"""What trackers show of a load: a picture, a small table, and a few numbers over the layers.

Their number does not grow with the experts: one picture and one table of ten rows a snapshot, nine
percentiles, and two numbers a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moebalance.cleaning import for_markdown
from moebalance.metrics.image import Pixels, load_image
from moebalance.report.loads import layer_names, matrix, ratios
from moebalance.report.pack import DEAD
from moebalance.runlog import Row, Run

Array = NDArray[np.float64]
COLUMNS = ("", "layer", "expert", "load")
_EACH = 5
_PERCENTILES = (10, 50, 90)
_GROWTH = 1.05


@dataclass(frozen=True)
class Show:
    """What to send next to a run's scalars, a switch each.

    Attributes:
        layers: MaxVio and the dead fraction of every layer.
        percentiles: of MaxVio, Gini and the dead fraction over layers.
        images: the load of every expert of every layer, as a picture.
        tables: the hottest and the coldest experts.
    """

    layers: bool = True
    percentiles: bool = True
    images: bool = True
    tables: bool = True

    @classmethod
    def of(cls, words: Iterable[str]) -> Show:
        """What is named is shown, and nothing else; `none` names nothing.

        Raises:
            ValueError: a word is unknown.
        """
        known = [field.name for field in fields(cls)]
        asked = [word.strip() for word in words]
        for word in asked:
            if word not in (*known, "none"):
                raise ValueError(
                    f"cannot show {word!r}; trackers can show {', '.join(known)}, or none"
                )
        return cls(**{name: name in asked for name in known})


class Shown(NamedTuple):
    """What one row of a log has for a tracker."""

    scalars: Mapping[str, float] = {}
    images: Mapping[str, Pixels] = {}
    tables: Mapping[str, list[list[str | float]]] = {}


class Pace:
    """When the next picture is due: where steps have grown by 5 %, and at the planned end.

    A run of any length so sends a few hundred pictures at most.
    """

    def __init__(self, planned: object = None) -> None:
        self._planned = planned
        self._next: dict[str, float] = {}

    def due(self, kind: str, step: int) -> bool:
        """Whether a row of this kind at this step has its picture sent."""
        if step < self._next.get(kind, 0) and step != self._planned:
            return False
        self._next[kind] = step * _GROWTH
        return True


def by_layer(row: Row, header: Row) -> dict[str, float]:
    """`moe/layer_3/maxvio` and `moe/layer_3/dead` for every layer."""
    found = {}
    for name, layer in _layers(row, header):
        place = f"moe/{name.replace(' ', '_')}"
        found[f"{place}/maxvio"] = layer.max() - 1
        found[f"{place}/dead"] = float((layer < DEAD).mean())
    return found


def percentiles(row: Row, header: Row) -> dict[str, float]:
    """`moe/layers/maxvio_p90` and its like: where most layers are, and where the worst are."""
    layers = [layer for _, layer in _layers(row, header)]
    if not layers:
        return {}
    measured = {
        "maxvio": [layer.max() - 1 for layer in layers],
        "gini": [_gini(layer) for layer in layers],
        "dead": [(layer < DEAD).mean() for layer in layers],
    }
    return {
        f"moe/layers/{name}_p{percent}": float(np.percentile(values, percent))
        for name, values in measured.items()
        for percent in _PERCENTILES
    }


def picture(row: Row) -> Pixels | None:
    """The load of the row as pixels; None if it has none."""
    grid = [[math.nan if x is None else x for x in line] for line in matrix(row.get("load"))]
    return load_image(grid) if grid and all(grid) else None


def extremes(row: Row, header: Row, each: int = _EACH) -> list[list[str | float]]:
    """The hottest and the coldest experts of all layers, in rows of `COLUMNS`.

    The load is a multiple of an even one. With few experts no expert is in both halves.
    """
    found = [
        (float(ratio), name, expert)
        for name, layer in _layers(row, header)
        for expert, ratio in enumerate(layer)
    ]
    found.sort(key=lambda item: item[0])
    some = min(each, len(found) // 2)
    rows: list[list[str | float]] = []
    for word, part in (("hottest", found[len(found) - some :][::-1]), ("coldest", found[:some])):
        rows += [[word, name, expert, round(ratio, 3)] for ratio, name, expert in part]
    return rows


def markdown(rows: Iterable[Iterable[str | float]]) -> str:
    """Rows of `COLUMNS` as a Markdown table."""
    texts = ([for_markdown(str(cell)) for cell in row] for row in rows)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *texts]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _layers(row: Row, header: Row) -> list[tuple[str, Array]]:
    """Each layer that counted something: its name, and its load in multiples of an even one."""
    grid = ratios(row, "load")
    names = layer_names(Run(Path(), header), len(grid))
    return [
        (name, np.array(layer, dtype=float))
        for name, layer in zip(names, grid, strict=True)
        if layer and all(ratio is not None and math.isfinite(ratio) for ratio in layer)
    ]


def _gini(ratios: Array) -> float:
    count = len(ratios)
    rank = 2 * np.arange(1, count + 1) - count - 1
    return float((rank * np.sort(ratios)).sum() / count**2)
