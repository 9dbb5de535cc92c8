"""The figures for papers, each a function from one batching mode to a Matplotlib figure.

None where the runs have no rows for it. Maps and clouds of experts are drawn from one run a method,
as experts have no identity across seeds; everything else is over all seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from moebalance.report.canvas import LINES, grid, legend_below, logarithmic, look, panels, words
from moebalance.report.estimates import MethodSummary
from moebalance.report.frames import mean_sorted
from moebalance.report.heatmap import by_domain
from moebalance.report.loads import (
    domain_names,
    drawn,
    layer_names,
    matrix,
    promised_and_delivered,
    ratios,
    relative,
    source,
)
from moebalance.report.pack import DEAD
from moebalance.report.plots import curve, seed_points, span, window_of
from moebalance.report.summary import Section
from moebalance.runlog import Run

PAGE, COLUMN = 7.0, 3.4
_CURVES = (
    ("maxvio", "MaxVio of each step"),
    ("gini", "Gini of each step"),
    ("loss", "Training loss (nats/token)"),
)
# The report's colours from ¼× to 4× in thirds of a doubling; below, experts that are dead.
_SHADES = (
    *("#0b3c73", "#2a5f98", "#5584b6", "#84a8cd", "#b2c9e0", "#d9e3ec", "#f0efeb"),
    *("#f6dfce", "#f3c3a0", "#e79d6c", "#d4743c", "#b1501c", "#832f06"),
)
_MAP = ListedColormap(_SHADES).with_extremes(under="#000000", bad="#ffffff")
_NORM = BoundaryNorm([(i - 6.5) / 3 for i in range(14)], len(_SHADES))
_DEAD_CODE = -9.0
_LEGEND_ROW = 0.17  # inches


def loss_against_maxvio(section: Section) -> Figure | None:
    """Validation loss over global MaxVio: mean ± sd, a faint dot a seed, a line along a sweep."""
    shown = [m for m in section.methods if {"loss", "maxvio"} <= m.estimates.keys()]
    if not shown:
        return None
    figure, (axes,) = panels(width=COLUMN, height=2.5 + _LEGEND_ROW * _rows(shown, 2))
    for method, settings in groupby(shown, key=lambda m: m.method):
        _sweep(axes, method, list(settings))
    across = [value for m in shown for value in span(m, "maxvio")]
    if min(across) > 0 and max(across) > 8 * min(across):
        logarithmic(axes, x=True)
    axes.set_xlabel("MaxVio, global")
    axes.set_ylabel("Validation loss (nats/token)")
    legend_below(figure, axes, columns=_columns(shown, 2))
    return figure


def training(section: Section) -> Figure | None:
    """MaxVio, Gini and loss over steps: the mean, and a band from lowest to highest seed."""
    window = window_of(section.methods)
    found = {
        title: [
            (m, line) for m in section.methods if (line := curve(m.used or m.runs, key, window))
        ]
        for key, title in _CURVES
    }
    found = {title: lines for title, lines in found.items() if lines}
    if not found:
        return None
    figure, axes = panels(
        len(found), width=PAGE, height=2.0 + _LEGEND_ROW * _rows(section.methods, 4)
    )
    for panel, (title, lines) in zip(axes, found.items(), strict=True):
        for m, line in lines:
            steps = [point.step for point in line]
            style = _line(m, section.methods)
            panel.plot(steps, [point.mean for point in line], **style, label=words(m.label))
            band = [point.low for point in line], [point.high for point in line]
            panel.fill_between(steps, *band, color=style["color"], alpha=0.15, linewidth=0)
        low = min(point.low for _, line in lines for point in line)
        high = max(point.high for _, line in lines for point in line)
        if low > 0 and high > 20 * low:
            logarithmic(panel, y=True)
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("Step")
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
    shown = [
        (m, line)
        for m, run in drawn(section.methods, "load")
        if (line := mean_sorted(ratios(source(run, "load"), "load")))
    ]
    if not shown:
        return None
    figure, (axes,) = panels(
        width=COLUMN, height=2.2 + _LEGEND_ROW * _rows([m for m, _ in shown], 2)
    )
    axes.axhline(1.0, color="#5c6570", linewidth=0.8, linestyle=":")
    for m, line in shown:
        style = _line(m, section.methods)
        axes.plot(range(1, len(line) + 1), line, **style, label=words(m.label))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Experts, most to least loaded")
    axes.set_ylabel("Load / even share")
    legend_below(figure, axes, columns=_columns([m for m, _ in shown], 2))
    return figure


def soft_against_hard(section: Section) -> Figure | None:
    """What probabilities promise over what top-k delivers, a dot an expert of any layer."""
    shown = [
        (m, pairs)
        for m, run in drawn(section.methods, "soft")
        if (pairs := promised_and_delivered(run))
    ]
    if not shown:
        return None
    figure, cells = grid(len(shown), width=PAGE, height=1.75)
    low, high = 2.0**-4, 2.0**3.5
    for axes, (m, pairs) in zip(cells, shown, strict=True):
        # What lies beyond the axes stands at their edge; a dead expert at the bottom.
        soft, hard = (np.clip(column, low, high) for column in zip(*pairs, strict=True))
        axes.plot([low, high], [low, high], color="#5c6570", linewidth=0.8, linestyle=":")
        axes.scatter(soft, hard, s=7, color=look(m.method)["color"], alpha=0.5, linewidths=0)
        axes.set(xscale="log", yscale="log", xlim=(low / 1.3, high * 1.3), aspect="equal")
        axes.set_ylim(low / 1.3, high * 1.3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([0.25, 1, 4], ["¼", "1", "4"])
            axis.set_ticks([], minor=True)
        axes.set_title(words(m.label, 30), fontsize=8, loc="left")
    figure.supxlabel("Soft load / even share", fontsize=9)
    figure.supylabel("Hard load / even share", fontsize=9)
    return figure


def domains(section: Section) -> Figure | None:
    """Domain × expert in the last layer: how each domain's tokens spread over the experts."""
    maps = []
    for m, run in drawn(section.methods, "domain_load"):
        last = _last_layer(run)
        if last:
            order = by_domain(last)
            rows = [[line[expert] for expert in order] for line in last]
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
    """Columns of the legend: half as many where a setting stands beside the method's name."""
    return most if max(len(m.label) for m in shown) <= 22 else most // 2


def _rows(shown: Sequence[MethodSummary], most: int) -> int:
    return math.ceil(len(shown) / _columns(shown, most))


def _sweep(axes: Axes, method: str, settings: Sequence[MethodSummary]) -> None:
    """The settings of one method: a line through them, and each with its spread."""
    style = look(method)
    points = sorted((m.estimates["maxvio"].mean, m.estimates["loss"].mean) for m in settings)
    if len(points) > 1:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=style["color"], alpha=0.5, linewidth=1)
    for m in settings:
        x, y = m.estimates["maxvio"], m.estimates["loss"]
        low, _ = span(m, "maxvio")
        spread = None if x.sd is None else [[x.mean - low], [x.sd]]
        label = words(m.label) + (" (not finished)" if m.partial else "")
        bars: dict[str, Any] = {"linestyle": "", "markersize": 6, "elinewidth": 1, "label": label}
        axes.errorbar([x.mean], [y.mean], xerr=spread, yerr=y.sd, **style, **bars)
        if len(seeds := seed_points(m)) > 1:
            xs, ys = zip(*seeds, strict=True)
            axes.scatter(xs, ys, s=5, color=style["color"], alpha=0.4, linewidths=0)


def _line(m: MethodSummary, methods: Sequence[MethodSummary]) -> dict[str, Any]:
    """The method's colour; its settings differ in dashes, and no balancing is dashed as well."""
    settings = [other for other in methods if other.method == m.method]
    place = next(i for i, other in enumerate(settings) if other is m) + (m.method == "none")
    return {"color": look(m.method)["color"], "linestyle": LINES[place % len(LINES)]}


def _maps(
    maps: Sequence[tuple[MethodSummary, list[str], list[list[float | None]]]], x_title: str
) -> Figure | None:
    """A map a method on the report's scale, and the scale beside them."""
    if not maps:
        return None
    rows = max(len(values) for _, _, values in maps)
    figure, cells = grid(len(maps), columns=3, width=PAGE, height=min(0.45 + 0.14 * rows, 2.4))
    for axes, (m, names, values) in zip(cells, maps, strict=True):
        longest = max(map(len, values))
        codes = [[_code(x) for x in line] + [math.nan] * (longest - len(line)) for line in values]
        axes.imshow(codes, cmap=_MAP, norm=_NORM, aspect="auto", interpolation="nearest")
        every = math.ceil(len(names) / 8)
        shown = range(0, len(names), every)
        axes.set_yticks(shown, [words(names[i][:14]) for i in shown], fontsize=7)
        axes.tick_params(length=0, labelsize=7)
        axes.grid(visible=False)
        axes.set_title(words(m.label, 30), fontsize=8, loc="left")
    figure.supxlabel(x_title, fontsize=9)
    scale = ScalarMappable(_NORM, _MAP)
    bar = figure.colorbar(scale, ax=list(cells), extend="min", aspect=14, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["¼×", "½×", "1×", "2×", "4×"], fontsize=7)
    bar.ax.set_title("load", fontsize=7)
    return figure


def _code(ratio: float | None) -> float:
    """The ratio in doublings, within the scale; dead below it, not a number where not measured."""
    if ratio is None:
        return math.nan
    return _DEAD_CODE if ratio < DEAD else min(max(math.log2(ratio), -2.0), 2.0)


def _last_layer(run: Run) -> list[list[float | None]]:
    """Domain × expert of the last layer that has such a matrix; empty without one."""
    row = source(run, "domain_load")
    for layer in reversed(row["domain_load"] if row else []):
        grid = [relative(line) for line in matrix(layer)]
        if grid and grid[0] and len({len(line) for line in grid}) == 1:
            return grid
    return []
