"""The figures drawn against axes: loss against MaxVio, and MaxVio over steps. Strings of SVG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from moebalance.report.axes import Axis, Ink, frame
from moebalance.report.estimates import MethodSummary, finite
from moebalance.report.labels import Anchor, Box, leader, place
from moebalance.report.methods import looks
from moebalance.runlog import Run

WIDTH, HEIGHT, CURVES_WIDTH = 640, 400, 470
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 40, 52
_POINTS = 120
_STAR = " ".join(
    f"{(7.5 if i % 2 == 0 else 3.2) * math.sin(i * math.pi / 5):.1f},"
    f"{-(7.5 if i % 2 == 0 else 3.2) * math.cos(i * math.pi / 5):.1f}"
    for i in range(10)
)
MARKERS = {
    "circle": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0Z",
    "square": "M-5 -5h10v10h-10Z",
    "diamond": "M0 -7L7 0L0 7L-7 0Z",
    "up": "M0 -6.5L6.5 5L-6.5 5Z",
    "down": "M0 6.5L6.5 -5L-6.5 -5Z",
    "left": "M-6.5 0L5 -6.5L5 6.5Z",
    "right": "M6.5 0L-5 -6.5L-5 6.5Z",
    "plus": "M-2.2 -6.5h4.4v4.3h4.3v4.4h-4.3v4.3h-4.4v-4.3h-4.3v-4.4h4.3Z",
    "cross": "M-6.3 -3.2L-3.2 -6.3L0 -3.1L3.2 -6.3L6.3 -3.2L3.1 0L6.3 3.2L3.2 6.3L0 3.1L-3.2 6.3"
    "L-6.3 3.2L-3.1 0Z",
    "hexagon": "M-3.3 -5.8h6.6L6.6 0L3.3 5.8h-6.6L-6.6 0Z",
    "pentagon": "M0 -6.5L6.2 -2L3.8 5.3L-3.8 5.3L-6.2 -2Z",
    "star": f"M{_STAR}Z",
}


def marker(method: str) -> str:
    """The path data of a method's mark, about 13 pixels wide, centred on the origin."""
    return MARKERS[looks([method])[method].marker]


def scatter(
    methods: Sequence[MethodSummary],
    ink: Ink,
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    named: bool = True,
) -> str | None:
    """Validation loss against global MaxVio: a mark a method with ± sd bars, faint dots per seed.

    Returns None if no method has both numbers. The lower left is where one wants to be. MaxVio is
    on a logarithmic axis if it spans more than a factor of eight. Without ``named`` the marks
    stand alone, for a page too narrow for their names.
    """
    shown = [m for m in methods if {"loss", "maxvio"} <= m.estimates.keys()]
    if not shown:
        return None
    spans = [(span(m, "maxvio"), span(m, "loss")) for m in shown]
    seeds = [point for m in shown for point in seed_points(m)]
    across = [v for across, _ in spans for v in across] + [point[0] for point in seeds]
    up = [v for _, up in spans for v in up] + [point[1] for point in seeds]
    x = Axis.over(across, _LEFT, width - _RIGHT, log_above=8, margin=0.12)
    y = Axis.over(up, height - _BOTTOM, _TOP)
    parts = [
        frame(
            x,
            y,
            ink,
            x_title=f"MaxVio, global{', log scale' if x.log else ''}",
            y_title="Validation loss, nats/token",
        ),
        _links(shown, x, y, ink),
    ]
    anchors, bars = [], []
    for m, (span_x, span_y) in zip(shown, spans, strict=True):
        at = x.at(m.estimates["maxvio"].mean), y.at(m.estimates["loss"].mean)
        low_x, high_x, low_y, high_y = *map(x.at, span_x), *map(y.at, span_y)
        bars.append(Box(low_x, at[1] - 2, high_x, at[1] + 2))
        bars.append(Box(at[0] - 2, high_y, at[0] + 2, low_y))
        dots = [(x.at(a), y.at(b)) for a, b in seed_points(m)]
        bars += [Box(a - 2, b - 2, a + 2, b + 2) for a, b in dots]
        anchors.append(Anchor(*at, m.label + (" (not finished)" if m.partial else "")))
        bar = f"M{low_x:.1f} {at[1]:.1f}H{high_x:.1f}M{at[0]:.1f} {low_y:.1f}V{high_y:.1f}"
        parts.append(_mark(m, anchors[-1], bar, dots, ink))
    bounds = Box(_LEFT + 2, _TOP - 6, width - 4, height - _BOTTOM - 2)
    if named:
        parts += _names(shown, anchors, place(anchors, bars, bounds), ink)
    return _svg(
        "".join(parts), "Validation loss against global MaxVio, one mark a method", width, height
    )


class CurvePoint(NamedTuple):
    """One window of steps: its middle, the mean over runs, the lowest and the highest run."""

    step: float
    mean: float
    low: float
    high: float


def curve(runs: Iterable[Run], key: str, window: int) -> list[CurvePoint]:
    """A step metric of several runs, averaged in windows of ``window`` steps, then over runs.

    Missing and non-finite values are left out; a window without any has no point.
    """
    windows: dict[int, list[float]] = {}
    for run in runs:
        found: dict[int, list[float]] = {}
        for row in run.steps:
            value = finite(row, key)
            if value is not None:
                found.setdefault((row["step"] - 1) // window, []).append(value)
        for i, values in found.items():
            windows.setdefault(i, []).append(statistics.fmean(values))
    return [
        CurvePoint((i + 0.5) * window + 0.5, statistics.fmean(v), min(v), max(v))
        for i, v in sorted(windows.items())
    ]


def window_of(methods: Sequence[MethodSummary]) -> int:
    """How many steps one point of a curve stands for, so that a curve has about 120 points."""
    last = max((run.last_step for m in methods for run in m.runs), default=0)
    return max(1, math.ceil(last / _POINTS))


def curves(
    methods: Sequence[MethodSummary],
    ink: Ink,
    key: str = "maxvio",
    *,
    title: str = "MaxVio of each step",
    width: int = CURVES_WIDTH,
    height: int = HEIGHT,
) -> str | None:
    """A step metric over steps, one line a method, with the range over seeds as a faint band.

    Returns None if no run logged the metric. The vertical axis is logarithmic if the values span
    more than a factor of twenty.
    """
    window = window_of(methods)
    # As in the table: runs cut short do not enter the mean where whole ones exist.
    found = {id(m): curve(m.used or m.runs, key, window) for m in methods}
    points = [point for line in found.values() for point in line]
    if not points:
        return None
    x = Axis.over([0.0, max(p.step for p in points)], _LEFT, width - _RIGHT, margin=0.02)
    y = Axis.over(
        [v for p in points for v in (p.low, p.high)], height - _BOTTOM, _TOP, log_above=20
    )
    log = ", log scale" if y.log else ""
    parts = [frame(x, y, ink, x_title="Step", y_title=f"{title}{log}")]
    # The subject, first in page order, is drawn last and so lies on top.
    for m in reversed(methods):
        line = found[id(m)]
        if not line:
            continue
        colour = ink.methods[m.method]
        dash = ";stroke-dasharray:5 4" if m.method == "none" else ""
        band = "".join(
            f"M{_join(x, y, part, 'high')}L{_join(x, y, part[::-1], 'low')}Z"
            for part in _unbroken(line, window)
            if any(p.high > p.low for p in part)
        )
        path = "".join(f"M{_join(x, y, part, 'mean')}" for part in _unbroken(line, window))
        parts.append(
            f'<g class="series" data-method="{escape(m.method)}" data-label="{escape(m.label)}">'
            f"<title>{escape(m.label)}</title>"
            f'<path d="{band}" style="fill:{colour};fill-opacity:.13"/>'
            f'<path class="line" d="{path}" style="fill:none;stroke:{colour};stroke-width:1.8;'
            f'stroke-linejoin:round;stroke-linecap:round{dash}"/></g>'
        )
    axes = f'class="chart" tabindex="0" {x.attributes("x")} {y.attributes("y")}'
    return _svg("".join(parts), f"{title}, one line a method", width, height, axes)


def _svg(
    body: str, label: str, width: int = WIDTH, height: int = HEIGHT, attributes: str = ""
) -> str:
    size = f'viewBox="0 0 {width} {height}"'
    more = f" {attributes}" if attributes else ""
    return f'<svg {size} role="img" aria-label="{escape(label)}"{more}>{body}</svg>'


def _mark(
    m: MethodSummary, at: Anchor, bar: str, seeds: Sequence[tuple[float, float]], ink: Ink
) -> str:
    colour = ink.methods[m.method]
    dots = "".join(
        f'<circle class="seed" cx="{x:.1f}" cy="{y:.1f}" r="2"/>'
        for x, y in seeds
        if len(seeds) > 1
    )
    faint = ";fill-opacity:.35" if m.partial else ""
    return (
        f'<g class="series" data-method="{escape(m.method)}" '
        f'style="fill:{colour};stroke:{colour}">'
        f"<title>{escape(at.text)}: MaxVio {m.estimates['maxvio'].text(3)}, validation loss "
        f"{m.estimates['loss'].text(4)}</title>"
        f'<g style="opacity:.4;stroke:none">{dots}</g>'
        f'<path class="bar" d="{bar}" style="stroke-width:1.4"/>'
        f'<path class="mark" transform="translate({at.x:.2f},{at.y:.2f})" '
        f'd="{marker(m.method)}" style="stroke:{ink.paper};stroke-width:1.2{faint}"/></g>'
    )


def seed_points(method: MethodSummary) -> list[tuple[float, float]]:
    """MaxVio and loss of each seed that has both."""
    across, up = method.values["maxvio"], method.values["loss"]
    return [(across[seed], up[seed]) for seed in across if seed in up]


def span(method: MethodSummary, metric: str) -> tuple[float, float]:
    """Mean ± sd; never down to zero or below for a positive mean, which a log axis cannot show."""
    estimate = method.estimates[metric]
    sd = estimate.sd or 0.0
    low = estimate.mean - sd
    if low <= 0 < estimate.mean:
        low = min(method.values[metric].values())
    return low, estimate.mean + sd


def _links(shown: Sequence[MethodSummary], x: Axis, y: Axis, ink: Ink) -> str:
    """A thin line through the settings of one method: its frontier over a sweep."""
    parts = []
    for method in dict.fromkeys(m.method for m in shown):
        sweep = sorted(
            (m.estimates["maxvio"].mean, m.estimates["loss"].mean)
            for m in shown
            if m.method == method
        )
        for (x1, y1), (x2, y2) in pairwise(sweep):
            parts.append(
                f'<path d="M{x.at(x1):.1f} {y.at(y1):.1f}L{x.at(x2):.1f} {y.at(y2):.1f}" '
                f'style="stroke:{ink.methods[method]};stroke-opacity:.5"/>'
            )
    return "".join(parts)


def _names(
    shown: Sequence[MethodSummary], anchors: Sequence[Anchor], boxes: Sequence[Box], ink: Ink
) -> list[str]:
    parts = []
    for m, anchor, box in zip(shown, anchors, boxes, strict=True):
        middle = (box.top + box.bottom) / 2
        line, end = "", leader(anchor, box)
        if end:
            line = (
                f'<path d="M{anchor.x:.1f} {anchor.y:.1f}L{end[0]:.1f} {end[1]:.1f}" '
                f'style="stroke:{ink.methods[m.method]};stroke-width:.8;stroke-opacity:.7"/>'
            )
        side = "start" if box.left >= anchor.x else "end" if box.right <= anchor.x else "middle"
        at = {"start": box.left, "end": box.right, "middle": (box.left + box.right) / 2}[side]
        weight = ";font-weight:650" if m.method == "phi" else ""
        parts.append(
            f'<g class="series" data-method="{escape(m.method)}">{line}'
            f'<text class="name" x="{at:.1f}" y="{middle + 4.2:.1f}" text-anchor="{side}" '
            f'style="fill:{ink.text};stroke:{ink.paper};stroke-width:3;paint-order:stroke;'
            f'stroke-linejoin:round{weight}">{escape(anchor.text)}</text></g>'
        )
    return parts


def _unbroken(line: Sequence[CurvePoint], window: int) -> list[list[CurvePoint]]:
    """The line cut wherever a window has no value."""
    parts = [[line[0]]]
    for before, point in pairwise(line):
        if point.step - before.step > 1.5 * window:
            parts.append([])
        parts[-1].append(point)
    return parts


def _join(x: Axis, y: Axis, part: Sequence[CurvePoint], which: str) -> str:
    return "L".join(f"{x.at(p.step):.1f} {y.at(getattr(p, which)):.1f}" for p in part)
