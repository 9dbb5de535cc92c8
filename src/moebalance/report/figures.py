"""The figures for papers and for the README, each from one batching mode; None without rows for it.

Maps and clouds of experts are drawn from one run a method, as experts have no identity across
seeds; everything else is over all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from moebalance.metrics.image import DEAD_SHADE, SHADES
from moebalance.report import draw
from moebalance.report.canvas import INK, MUTED, grid, heading, legend_below, panels, save
from moebalance.report.estimates import MethodSummary
from moebalance.report.frames import by_domain, mean_sorted
from moebalance.report.loads import (
    domain_loads,
    domain_names,
    drawn,
    layer_names,
    promised_and_delivered,
    ratios,
    source,
)
from moebalance.report.pictures import plane
from moebalance.report.summary import Section

__all__ = ["FIGURES", "readme", "save"]

PAGE, COLUMN = 7.0, 3.4
_CURVES = (
    ("maxvio", "MaxVio of each step"),
    ("gini", "Gini of each step"),
    ("loss", "Training loss (nats/token)"),
)
_LEGEND_ROW = 0.17  # inches
_FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"


def readme(section: Section) -> str | None:
    """Loss against MaxVio with names next to the marks, as SVG on a white card."""
    inside = plane(draw.placed(section.methods), 720, 430, None)
    if inside is None:
        return None
    count = max(method.seeds for method in section.methods)
    seeds = f"mean ± sd over {count} seeds" if count > 1 else "one seed"
    about = escape(f"{section.title}, {seeds}; down and to the left is better")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 752 506" width="752" height="506" '
        f'font-family="{_FONT}" font-size="12" stroke-linecap="round">'
        '<rect x=".5" y=".5" width="751" height="505" rx="10" fill="#ffffff" stroke="#d5d9de"/>'
        f'<text x="22" y="32" font-size="15" font-weight="600" fill="{INK}">Validation loss '
        f'against load imbalance</text><text x="22" y="51" fill="{MUTED}">{about}</text>'
        + inside.replace("<svg ", '<svg x="16" y="64" width="720" height="430" ', 1)
        + "</svg>\n"
    )


def loss_against_maxvio(section: Section) -> Figure | None:
    """Validation loss over global MaxVio: mean ± sd, a faint dot a seed, a line along a sweep."""
    shown = draw.placed(section.methods)
    if not shown:
        return None
    figure, (axes,) = panels(width=COLUMN, height=2.5 + _LEGEND_ROW * _rows(shown, 2))
    draw.scatter(axes, shown)
    axes.set_ylabel("Validation loss (nats/token)")
    legend_below(figure, axes, columns=_columns(shown, 2))
    return figure


def training(section: Section) -> Figure | None:
    """MaxVio, Gini and loss over steps: the mean, and a band from lowest to highest seed."""
    window = draw.window_of(section.methods)
    logged = [
        (key, title)
        for key, title in _CURVES
        if any(draw.curve(m.used or m.runs, key, window) for m in section.methods)
    ]
    if not logged:
        return None
    height = 2.0 + _LEGEND_ROW * _rows(section.methods, 4)
    figure, axes = panels(len(logged), width=PAGE, height=height)
    for panel, (key, title) in zip(axes, logged, strict=True):
        draw.course(panel, section.methods, key, window)
        panel.set_title(title, fontsize=9, loc="left")
    legend_below(figure, axes[0], columns=_columns(section.methods, 4))
    return figure


def load(section: Section) -> Figure | None:
    """Layer × expert, a map a method: each layer's experts from the most to the least loaded."""
    maps = []
    for m, run in drawn(section.methods, "load"):
        layers = [layer for layer in ratios(source(run, "load"), "load") if layer]
        ranked = [sorted(layer, key=lambda x: math.inf if x is None else -x) for layer in layers]
        maps.append((m, layer_names(run, len(ranked)), ranked))
    return _maps(maps, "Experts, most to least loaded")


def load_by_rank(section: Section) -> Figure | None:
    """Load over rank, a line a method, mean over layers."""
    lines = [
        (m, line)
        for m, run in drawn(section.methods, "load")
        if (line := mean_sorted(ratios(source(run, "load"), "load")))
    ]
    if not lines:
        return None
    shown = [m for m, _ in lines]
    figure, (axes,) = panels(width=COLUMN, height=2.2 + _LEGEND_ROW * _rows(shown, 2))
    draw.ranks(axes, lines)
    axes.set_ylabel("Load / even share")
    legend_below(figure, axes, columns=_columns(shown, 2))
    return figure


def soft_against_hard(section: Section) -> Figure | None:
    """What probabilities promise over what top-k delivers: discs of experts of any layer."""
    shown = [
        (m, pairs)
        for m, run in drawn(section.methods, "soft")
        if (pairs := promised_and_delivered(run))
    ]
    if not shown:
        return None
    figure, cells = grid(len(shown), width=PAGE, height=1.75)
    for axes, (m, pairs) in zip(cells, shown, strict=True):
        draw.cloud(axes, pairs, m.look.light)
        axes.set_title(heading(m.label), fontsize=8, loc="left")
    figure.supxlabel("Soft load, promised", fontsize=9)
    figure.supylabel("Hard load, delivered", fontsize=9)
    return figure


def domains(section: Section) -> Figure | None:
    """Domain × expert of the last layer, a map a method, experts by the domain they serve most."""
    maps = []
    for m, run in drawn(section.methods, "domain_load"):
        known = [found for found in domain_loads(source(run, "domain_load")) if found]
        if known:
            order = by_domain(known[-1])
            rows = [[line[e] for e in order] for line in known[-1]]
            maps.append((m, domain_names(run, len(rows)), rows))
    return _maps(maps, "Experts, by the domain they serve most")


FIGURES: dict[str, Callable[[Section], Figure | None]] = {
    "loss-against-maxvio": loss_against_maxvio,
    "training": training,
    "load": load,
    "load-by-rank": load_by_rank,
    "soft-against-hard": soft_against_hard,
    "domains": domains,
}


def _columns(shown: Sequence[MethodSummary], most: int) -> int:
    """Columns of the legend: half as many where a setting stands next to the method's name."""
    return most if max(len(m.label) for m in shown) <= 22 else most // 2


def _rows(shown: Sequence[MethodSummary], most: int) -> int:
    return math.ceil(len(shown) / _columns(shown, most))


def _maps(
    maps: Sequence[tuple[MethodSummary, list[str], list[list[float | None]]]], x_title: str
) -> Figure | None:
    """A map a method on the report's scale, and their scale."""
    if not maps:
        return None
    rows = max(len(values) for _, _, values in maps)
    figure, cells = grid(len(maps), columns=3, width=PAGE, height=min(0.45 + 0.14 * rows, 2.4))
    for axes, (m, names, values) in zip(cells, maps, strict=True):
        draw.heatmap(axes, values, [name[:14] for name in names])
        axes.tick_params(labelsize=7)
        axes.set_title(heading(m.label), fontsize=8, loc="left")
    figure.supxlabel(x_title, fontsize=9)
    _scale(figure, cells)
    return figure


def _scale(figure: Figure, cells: Sequence[Axes]) -> None:
    """The colours from ¼× to 4×, and below them the one of dead experts."""
    shades = ListedColormap(SHADES).with_extremes(under=DEAD_SHADE)
    norm = BoundaryNorm([(i - 6.5) / 3 for i in range(14)], len(SHADES))
    colours = ScalarMappable(norm, shades)
    bar = figure.colorbar(colours, ax=list(cells), extend="min", aspect=14, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["¼×", "½×", "1×", "2×", "4×"], fontsize=7)
    bar.ax.set_title("load", fontsize=7)
    bar.ax.set_xlabel("dead", fontsize=7, labelpad=9)
