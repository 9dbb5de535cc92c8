"""The figures of the evidence: panels of series, drawn in the style of the report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from evidence.study import Study
from moebalance.report.canvas import legend_below, logarithmic, look, panels, titles

GUIDE = "#5c6570"
"""Colour of a line that is no measurement."""


class Series(NamedTuple):
    """Points of one label, with their spread where it is known."""

    label: str | None
    x: Sequence[float]
    y: Sequence[float]
    style: dict[str, Any]
    x_sd: Sequence[float] | None = None
    y_sd: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        x: name of the axis below.
        y: name of the axis to the left.
        series: what is drawn, in order.
        log: `"x"`, `"y"` or `"xy"` for logarithmic axes.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series] = field(default_factory=tuple)
    log: str = ""


def draw(
    shown: Sequence[Panel], *, columns: int = 4, height: float = 2.9, width: float = 7.6
) -> Figure:
    """Panels in a row, with the fullest legend of them below."""
    figure, axes = panels(len(shown), height=height, width=width)
    for ax, panel in zip(axes, shown, strict=True):
        for each in panel.series:
            ax.errorbar(
                each.x, each.y, xerr=each.x_sd, yerr=each.y_sd, label=each.label, **each.style
            )
        logarithmic(ax, x="x" in panel.log, y="y" in panel.log)
        titles(ax, panel.title, panel.x, panel.y)
    fullest = max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[1]))
    if fullest.get_legend_handles_labels()[1]:
        legend_below(figure, fullest, columns=columns)
    return figure


def points(
    study: Study,
    settings: Iterable[str],
    x: str,
    y: str,
    *,
    label: Callable[[str], str | None],
    hollow: Collection[str] = (),
    numbers: Mapping[str, int] | None = None,
) -> list[Series]:
    """A mark for each setting: the means of two metrics over seeds, ± sd.

    Args:
        study: the runs.
        settings: what is shown.
        x: the metric across.
        y: the metric upwards.
        label: the words of a setting in the legend; None for none.
        hollow: settings whose marks are hollow.
        numbers: of the settings among those of their method, from `numbered`, which tell their
            marks apart; None if no two are of one method.
    """
    found = []
    for setting in settings:
        seen = look(study.method(setting), numbers[setting] if numbers else 0)
        style = {"linestyle": "", "markersize": 7, **seen}
        style |= {"markerfacecolor": "white"} if setting in hollow else {}
        across, up = study.estimate(setting, x), study.estimate(setting, y)
        if across and up:
            sds = [across.sd or 0], [up.sd or 0]
            found.append(Series(label(setting), [across.mean], [up.mean], style, *sds))
    return found


def numbered(methods: Mapping[str, str], hollow: Collection[str] = ()) -> dict[str, int]:
    """Number of each setting among those of its method, hollow or not, the shortest first.

    Args:
        methods: the word of each setting's method, over all panels of a figure.
        hollow: settings whose marks are hollow.

    >>> numbered({"phi": "phi", "phi(rate=1)": "phi", "phi(load='hard')": "phi"}, ["phi(rate=1)"])
    {'phi': 0, 'phi(rate=1)': 0, "phi(load='hard')": 1}
    """
    found: dict[str, int] = {}
    for setting in sorted(methods, key=len):
        kind = (methods[setting], setting in hollow)
        found[setting] = sum((methods[other], other in hollow) == kind for other in found)
    return found
