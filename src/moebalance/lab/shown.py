"""What trackers show of one row of a run log."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from moebalance.metrics.image import Pixels, load_image
from moebalance.metrics.shown import Layers
from moebalance.report.loads import layer_names, matrix, ratios
from moebalance.runlog import Row, Run


def picture(row: Row) -> Pixels | None:
    """The load of the row as pixels; None if it has none."""
    grid = [[math.nan if x is None else x for x in line] for line in matrix(row.get("load"))]
    return load_image(grid) if grid and all(grid) else None


def layers_of(row: Row, header: Row) -> Layers:
    """Each layer that counted something: its name, and its load in multiples of an even one."""
    grid = ratios(row, "load")
    names = layer_names(Run(Path(), header), len(grid))
    return [
        (name, np.array(layer, dtype=float))
        for name, layer in zip(names, grid, strict=True)
        if layer and all(ratio is not None and math.isfinite(ratio) for ratio in layer)
    ]
