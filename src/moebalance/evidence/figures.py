"""How the figures of the evidence look: one size, one grid, the report's colours and marks."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from moebalance.evidence.results import Study
from moebalance.report.estimates import Estimate
from moebalance.report.methods import looks

_STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e7e9ec",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "moebalance",
}
_MARKS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "up": "^",
    "down": "v",
    "left": "<",
    "right": ">",
    "plus": "P",
    "cross": "X",
    "hexagon": "h",
    "pentagon": "p",
    "star": "*",
}
CYCLE = ("#f2465f", "#414fcb", "#316613", "#32a1a1", "#8e5188", "#a3520b", "#708a04", "#39444c")
LINES = ("-", "--", ":", "-.")


def panels(count: int = 1, *, height: float = 2.9, width: float = 7.6) -> tuple[Figure, list[Axes]]:
    """A row of axes on white, laid out without overlaps."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        axes = figure.subplots(1, count, squeeze=False)[0]
    return figure, list(axes)


def look(method: str) -> dict[str, Any]:
    """Colour and mark of a method, as the report has them."""
    found = looks([method])[method]
    return {"color": found.light, "marker": _MARKS[found.marker]}


def logarithmic(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    """Log scales with plain numbers at 1, 2 and 5."""
    scaled: list[Axis] = []
    if x:
        axes.set_xscale("log")
        scaled.append(axes.xaxis)
    if y:
        axes.set_yscale("log")
        scaled.append(axes.yaxis)
    for axis in scaled:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def titles(axes: Axes, title: str, x: str, y: str) -> None:
    """Name a panel and its axes."""
    axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    with rc_context(_STYLE):
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG; the same figure gives the same bytes."""
    text = StringIO()
    with rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def point(axes: Axes, study: Study, setting: str, x: str, y: str, **style: Any) -> None:
    """A setting's mark at the means of two metrics, with ± sd over seeds."""
    across, up = (Estimate.of(study.by_seed(setting, metric).values()) for metric in (x, y))
    if across is not None and up is not None:
        axes.errorbar(
            across.mean, up.mean, xerr=across.sd, yerr=up.sd, linestyle="", markersize=7, **style
        )
