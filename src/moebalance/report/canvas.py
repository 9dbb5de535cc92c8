"""How Matplotlib's figures look: one size, one grid, the report's colours and marks.

All that is drawn, here and in the evidence, is drawn on it. The same figure gives the same bytes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from moebalance.cleaning import for_page
from moebalance.files import write_bytes, write_text
from moebalance.report.methods import LINES, MARKERS
from moebalance.report.methods import look as look_of

__all__ = [
    "CYCLE",
    "GRID",
    "GROUND",
    "INK",
    "LINES",
    "MARKS",
    "MUTED",
    "grid",
    "heading",
    "legend_below",
    "logarithmic",
    "look",
    "panels",
    "plain",
    "save",
    "sheet",
    "svg_text",
    "titles",
]

INK, MUTED, GRID, GROUND = "#1b1f24", "#5c6570", "#e6e8ea", "#fdfdfc"
"""Text, axes, grid lines and what lies behind; a page has other values for them in the dark."""
_STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "path.simplify": False,
    "svg.hashsalt": "moebalance",
    "pdf.fonttype": 42,  # TrueType, whole glyphs: what publishers take
}
MARKS = dict(zip(MARKERS, "osD^v<>PXhp*", strict=True))
_PIXELS: Any = {
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "axes.facecolor": "none",
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "xaxis.labellocation": "right",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 11,
}
CYCLE = ("#f2465f", "#414fcb", "#316613", "#32a1a1", "#8e5188", "#a3520b", "#708a04", "#39444c")


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


def look(method: str, setting: int = 0) -> dict[str, Any]:
    """Colour and mark of a method, as the report has them; `setting` counts settings of it."""
    found = look_of(method, setting)
    return {"color": found.light, "marker": MARKS[found.marker]}


class _Ticks(LogLocator):
    """Ticks at 1, 2 and 5; at more or fewer digits where that is too sparse or too dense."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """The places of ticks between two values."""
        decades = math.log10(max(vmin, vmax) / min(vmin, vmax)) if min(vmin, vmax) > 0 else 9
        self.set_params(subs=range(1, 10) if decades < 0.8 else (1, 2, 5) if decades < 3 else (1,))
        return super().tick_values(vmin, vmax)


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
        axis.set_major_locator(_Ticks())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def plain(text: str, most: int = 60) -> str:
    """A name from a log as plain text, cut if long; a dollar sign would begin a formula."""
    text = for_page(re.sub(r"[\t\n]+", " ", text))
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut.replace("$", r"\$")


def heading(label: str) -> str:
    """A method's name over a small panel; what tells its setting apart gets a line of its own."""
    return "\n".join(plain(part, 34) for part in label.split(" · "))


@contextmanager
def sheet(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """Axes for a picture in a page, one unit a pixel; draw on them within the context."""
    with rc_context({**_STYLE, **_PIXELS}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        axes = figure.add_axes((62 / width, 48 / height, 1 - 80 / width, 1 - 84 / height))
        yield figure, axes


@contextmanager
def _drawing() -> Iterator[None]:
    """Our style, and silence about characters that the font lacks.

    A reader of SVG draws them with its own fonts; PDF and PNG show a box that names their script.
    """
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def svg_text(figure: Figure) -> str:
    """The figure as SVG, without dates or versions."""
    text = StringIO()
    with _drawing():
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return for_page(text.getvalue())


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
    with _drawing():
        if path.suffix != ".svg":
            undated = {"CreationDate": None} if path.suffix == ".pdf" else {}
            drawn = BytesIO()
            figure.savefig(drawn, format=path.suffix[1:], dpi=300, metadata={**undated})
            write_bytes(path, drawn.getvalue())
            return
    lines = (line.rstrip() for line in svg_text(figure).splitlines())
    write_text(path, "\n".join(lines) + "\n")
