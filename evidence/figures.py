"""The figures of the evidence: the report's style, and a setting as a point with its spread."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from evidence.results import Study
from moebalance.report.canvas import (
    CYCLE,
    LINES,
    legend_below,
    logarithmic,
    look,
    panels,
    save,
    titles,
)
from moebalance.report.estimates import Estimate

__all__ = [
    "CYCLE",
    "LINES",
    "legend_below",
    "logarithmic",
    "look",
    "panels",
    "point",
    "save",
    "titles",
]


def point(axes: Axes, study: Study, setting: str, x: str, y: str, **style: Any) -> None:
    """A setting's mark at the means of two metrics, with ± sd over seeds."""
    across, up = (Estimate.of(study.by_seed(setting, metric).values()) for metric in (x, y))
    if across is not None and up is not None:
        axes.errorbar(
            across.mean, up.mean, xerr=across.sd, yerr=up.sd, linestyle="", markersize=7, **style
        )
