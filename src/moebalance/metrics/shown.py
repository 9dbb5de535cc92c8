"""What a tracker shows of a load: a few numbers over the layers, and a small table.

Their number does not grow with the experts: nine percentiles, two numbers a layer, a table of ten
rows, and one picture (`image.py`). Needs numpy alone.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moebalance.cleaning import for_markdown
from moebalance.metrics.image import DEAD, Pixels

Layers = Sequence[tuple[str, NDArray[np.float64]]]
"""The name of each layer, and its load (E,) in multiples of an even one."""
Rows = list[list[str | float]]
COLUMNS = ("end", "layer", "expert", "load")
_EACH = 5
_PERCENTILES = (10, 50, 90)
_GROWTH = 1.05


@dataclass(frozen=True)
class Show:
    """What to send to trackers next to the usual scalars, a switch each.

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
    """What one row of numbers has for a tracker."""

    scalars: Mapping[str, float] = {}
    images: Mapping[str, Pixels] = {}
    tables: Mapping[str, Rows] = {}


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


def multiples(loads: Mapping[str, ArrayLike]) -> Layers:
    """Loads (E,) of any unit as multiples of an even one; layers without a token are left out.

    >>> multiples({"model.layers.3.mlp.gate": [3, 1], "model.layers.4.mlp.gate": [0, 0]})
    [('layer 3', array([1.5, 0.5]))]
    """
    short = dict(zip(loads, _short(list(loads)), strict=True))
    known = {name: np.asarray(load, dtype=float) for name, load in loads.items()}
    return [
        (short[name], load * len(load) / total)
        for name, load in known.items()
        if math.isfinite(total := float(load.sum())) and total > 0
    ]


def by_layer(layers: Layers) -> dict[str, float]:
    """`layer_3/maxvio` and `layer_3/dead` for every layer."""
    found = {}
    for name, load in layers:
        place = name.replace(" ", "_")
        found[f"{place}/maxvio"] = load.max() - 1
        found[f"{place}/dead"] = float((load < DEAD).mean())
    return found


def percentiles(layers: Layers) -> dict[str, float]:
    """`layers/maxvio_p90` and its like: where most layers are, and where the worst are."""
    if not layers:
        return {}
    measured = {
        "maxvio": [load.max() - 1 for _, load in layers],
        "gini": [_gini(load) for _, load in layers],
        "dead": [(load < DEAD).mean() for _, load in layers],
    }
    return {
        f"layers/{name}_p{percent}": float(value)
        for name, values in measured.items()
        for percent, value in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True)
    }


def extremes(layers: Layers, each: int = _EACH) -> Rows:
    """The hottest and the coldest experts of all layers, in rows of `COLUMNS`.

    With few experts no expert is in both halves.
    """
    found = [
        (float(ratio), name, expert) for name, load in layers for expert, ratio in enumerate(load)
    ]
    found.sort(key=lambda item: item[0])
    some = min(each, len(found) // 2)
    rows: Rows = []
    for word, part in (("hottest", found[len(found) - some :][::-1]), ("coldest", found[:some])):
        rows += [[word, name, expert, round(ratio, 3)] for ratio, name, expert in part]
    return rows


def markdown(rows: Iterable[Iterable[str | float]]) -> str:
    """Rows of `COLUMNS` as a Markdown table."""
    texts = ([for_markdown(str(cell)) for cell in row] for row in rows)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *texts]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(names: Sequence[str]) -> list[str]:
    """`layer 3` from a module's name, where that tells all layers apart."""
    found = [re.search(r"\d+", name) for name in names]
    short = [f"layer {match[0]}" for match in found if match]
    return short if len(set(short)) == len(names) else list(names)


def _gini(ratios: NDArray[np.float64]) -> float:
    count = len(ratios)
    rank = 2 * np.arange(1, count + 1) - count - 1
    return float((rank * np.sort(ratios)).sum() / count**2)
