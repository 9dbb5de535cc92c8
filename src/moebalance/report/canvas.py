"""How Matplotlib's figures look: one size, one grid, the report's colours and marks.

The figures for papers and the page of evidence draw with it. The same figure gives the same bytes.
"""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

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
    "pdf.fonttype": 42,  # TrueType, whole glyphs: what publishers take
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


def grid(
    count: int, *, columns: int = 4, width: float = 7.6, height: float = 1.8
) -> tuple[Figure, list[Axes]]:
    """Small panels in rows, each `height` inches high."""
    columns = min(count, columns)
    rows = -(-count // columns)
    with rc_context(_STYLE):
        figure = Figure(
            figsize=(width, rows * height + 0.4), layout="constrained", facecolor="white"
        )
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


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


def words(text: str, most: int = 44) -> str:
    """A name from a log as plain text, cut if long; a dollar sign would begin a formula."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut.replace("$", r"\$")


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
    """Write a figure in the format that the file's name ends in: `.svg`, `.pdf` or `.png`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        if path.suffix != ".svg":
            undated = {"CreationDate": None} if path.suffix == ".pdf" else {}
            figure.savefig(path, dpi=300, metadata={**undated})
            return
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
