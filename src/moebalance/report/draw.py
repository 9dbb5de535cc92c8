"""What is drawn, each a function that draws on given axes: for the page, the README and papers.

A mark, a line or a band carries `kind:method` as its id, so that the page can tell them apart.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from moebalance.metrics.image import DEAD_SHADE, SHADES
from moebalance.report.canvas import GROUND, INK, MARKS, MUTED, logarithmic, plain
from moebalance.report.columns import LEAST_LOSS
from moebalance.report.estimates import MethodSummary, finite
from moebalance.report.labels import LEADER_FROM, leader_end, place
from moebalance.report.methods import leader
from moebalance.report.pack import DEAD
from moebalance.runlog import Run, column

_LETTER = 6.6  # pixels, the mean width of one at 12 pixels
_POINTS = 120
# Soft against hard, in thirds of a doubling from ⅛× to 8×; what lies beyond stands at the edge.
_THIRDS, _LOWEST = 9, 2.0**-4


class CurvePoint(NamedTuple):
    """One window of steps: its middle, the mean over runs, the lowest and the highest run."""

    step: float
    mean: float
    low: float
    high: float


def curve(runs: Iterable[Run], key: str, window: int) -> list[CurvePoint]:
    """A step metric of several runs, averaged in windows of `window` steps, then over runs.

    Missing and non-finite values are left out; a window without any has no point.
    """
    windows: dict[int, list[float]] = {}
    for run in runs:
        found: dict[int, list[float]] = {}
        steps = zip(column(run.steps, "step"), column(run.steps, key), strict=True)
        for step, logged in steps:
            value = finite({key: logged}, key)
            if value is not None:
                found.setdefault((step - 1) // window, []).append(value)
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


def placed(methods: Sequence[MethodSummary]) -> list[MethodSummary]:
    """The methods that have a place in the plane of loss and MaxVio."""
    return [m for m in methods if {"loss", "maxvio"} <= m.estimates.keys()]


def scatter(axes: Axes, methods: Sequence[MethodSummary]) -> None:
    """Validation loss over global MaxVio: mean ± sd, a dot a seed, a line along the settings."""
    for _, group in groupby(methods, key=lambda m: m.method):
        settings = list(group)
        sweep = sorted((m.estimates["maxvio"].mean, m.estimates["loss"].mean) for m in settings)
        if len(sweep) > 1:
            axes.plot(*zip(*sweep, strict=True), color=settings[0].look.light, lw=1, alpha=0.5)
        for m in settings:
            _mark(axes, m)
    across = [value for m in methods for value in _span(m, "maxvio")]
    if min(across) > 0 and max(across) > 8 * min(across):
        logarithmic(axes, x=True)
    _at_least(axes, LEAST_LOSS)
    axes.set_xlabel("MaxVio, global" + (", log scale" if axes.get_xscale() == "log" else ""))


def write_names(axes: Axes, methods: Sequence[MethodSummary]) -> None:
    """The name of each method next to its mark; call it last, when the axes have their limits.

    Where there is little room, a setting is named by what tells it from the others.
    """
    figure = axes.figure
    scale = 72 / figure.dpi
    to_pixels = axes.transData.transform
    narrow = axes.bbox.width * scale < 400
    labels = [m.label.partition(" · ")[2] or m.label if narrow else m.label for m in methods]
    names = [
        plain(label, 40) + (" (not finished)" if m.partial else "")
        for m, label in zip(methods, labels, strict=True)
    ]
    points = to_pixels([(m.estimates["maxvio"].mean, m.estimates["loss"].mean) for m in methods])
    covered = []
    lead = leader(m.method for m in methods)
    for m in methods:
        (left, right), (low, high) = _span(m, "maxvio"), _span(m, "loss")
        x, y = m.estimates["maxvio"].mean, m.estimates["loss"].mean
        ends = to_pixels([(left, y), (right, y), (x, low), (x, high)])
        covered += [(*(ends[0] - 2), *(ends[1] + 2)), (*(ends[2] - 2), *(ends[3] + 2))]
        covered += [(*(at - 2), *(at + 2)) for at in to_pixels(_seeds(m) or np.empty((0, 2)))]
    bounds = np.add(axes.bbox.extents, (2, 2, -2, 4))
    boxes = place(points, [_LETTER * len(name) for name in names], np.array(covered), bounds)
    for m, name, point, box in zip(methods, names, points, boxes, strict=True):
        end = leader_end(point, box[None])[0]
        side = "left" if box[0] >= point[0] else "right" if box[2] <= point[0] else "center"
        at = {"left": box[0], "right": box[2], "center": (box[0] + box[2]) / 2}[side]
        line = {"arrowstyle": "-", "color": m.look.light, "lw": 0.8, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            name,
            (m.estimates["maxvio"].mean, m.estimates["loss"].mean),
            scale * (np.array([at, (box[1] + box[3]) / 2]) - point),
            textcoords="offset points",
            ha=side,
            va="center",
            color=INK,
            weight="bold" if m.method == lead else "normal",
            arrowprops=line if math.dist(end, point) > LEADER_FROM else None,
            gid=f"name:{m.key}",
        )


def course(axes: Axes, methods: Sequence[MethodSummary], key: str, window: int) -> bool:
    """A step metric over steps, a line a method, with the range over seeds as a faint band.

    Returns whether any run logged it.
    """
    drawn = []
    for i, m in enumerate(methods):
        line = curve(m.used or m.runs, key, window)
        if not line:
            continue
        drawn += line
        # A window without a value breaks the line.
        holes = [
            CurvePoint(a.step + window, *[math.nan] * 3)
            for a, b in pairwise(line)
            if b.step - a.step > 1.5 * window
        ]
        step, mean, low, high = np.array(sorted([*line, *holes])).T
        axes.plot(step, mean, **_stroke(m, i))
        if (high > low).any():
            axes.fill_between(
                step, low, high, color=m.look.light, alpha=0.14, lw=0, gid=f"band:{m.key}"
            )
    if not drawn:
        return False
    low, high = min(p.low for p in drawn), max(p.high for p in drawn)
    if low > 0 and high > 20 * low:
        logarithmic(axes, y=True)
    axes.margins(x=0.02)
    _at_least(axes, LEAST_LOSS)
    axes.set_xlabel("Step")
    return True


def ranks(axes: Axes, lines: Sequence[tuple[MethodSummary, Sequence[float]]]) -> None:
    """Load by rank of the experts, as multiples of an even share, a line a method."""
    axes.axhline(1.0, color=MUTED, lw=1, ls=":")
    for i, (m, line) in enumerate(lines):
        axes.plot(range(1, len(line) + 1), line, **_stroke(m, i))
    axes.set_xlim(1, max(2, *(len(line) for _, line in lines)))
    axes.set_ylim(0, max(2.0, 1.05 * max(max(line) for _, line in lines)))
    axes.set_xlabel("Experts, from the most to the least loaded")


def cells(rows: Sequence[Sequence[float | None]]) -> list[PathPatch]:
    """Ratios to an even share as cells one unit large, a shape a colour, rows from 0 downwards."""
    shapes: dict[str, list[Path]] = defaultdict(list)
    for i, row in enumerate(rows):
        at = 0
        for colour, group in groupby(map(shade, row)):
            width = sum(1 for _ in group)
            shapes[colour].append(_box(at, i, width))
            at += width
    return [
        PathPatch(Path.make_compound_path(*boxes), facecolor=colour, lw=0)
        for colour, boxes in shapes.items()
    ]


def heatmap(axes: Axes, rows: Sequence[Sequence[float | None]], names: Sequence[str]) -> None:
    """A map of ratios to an even share, a row a layer or a domain."""
    for patch in cells(rows):
        axes.add_patch(patch)
    axes.set_xlim(0, max(map(len, rows)))
    axes.set_ylim(len(rows), 0)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    every = math.ceil(len(names) / 8)
    shown = range(0, len(names), every)
    axes.set_yticks([i + 0.5 for i in shown], [plain(names[i]) for i in shown])


def cloud(axes: Axes, pairs: Sequence[tuple[float, float]], colour: str) -> list[str]:
    """Soft load (across) against hard load (up) of experts, discs as large as there are many.

    Returns what to say of each disc, in the order in which they are drawn.
    """
    counts = Counter((_third(a), _third(b) if b >= DEAD else None) for a, b in pairs)
    found = sorted(counts.items(), key=lambda item: -item[1])
    cell = 72 * axes.bbox.width / axes.figure.dpi / (2.2 * _THIRDS)  # points
    largest = found[0][1]
    axes.plot((2**-3, 2**3), (2**-3, 2**3), color=MUTED, lw=0.8, ls=":")
    axes.scatter(
        [2 ** (a / 3) for (a, _), _ in found],
        [_LOWEST if b is None else 2 ** (b / 3) for (_, b), _ in found],
        s=[max(4.0, (1.7 * cell) ** 2 * count / largest) for _, count in found],
        color=colour,
        alpha=0.62,
        lw=0,
        clip_on=False,
        gid="disc",
        zorder=3,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(2**-3.3, 2**3.3)
    axes.set_ylim(2**-4.5, 2**3.3)
    axes.set_xticks((0.25, 1, 4), ("¼×", "1×", "4×"))
    axes.set_yticks((_LOWEST, 0.25, 1, 4), ("0", "¼×", "1×", "4×"))
    axes.minorticks_off()
    return [
        f"{count} of {len(pairs)} experts: promised {_around(a)}, "
        + ("got nothing: dead" if b is None else f"got {_around(b)}")
        for (a, b), count in found
    ]


def shade(ratio: float | None) -> str:
    """The colour of a ratio to an even share.

    >>> [SHADES.index(shade(r)) for r in (0.02, 0.25, 1.0, 2.0, 9.0)]
    [0, 0, 6, 9, 12]
    >>> shade(None) == GROUND, shade(0.001) == DEAD_SHADE
    (True, True)
    """
    if ratio is None:
        return GROUND
    if ratio < DEAD:
        return DEAD_SHADE
    return SHADES[min(max(round(3 * math.log2(ratio)), -6), 6) + 6]


def titles(methods: Sequence[MethodSummary]) -> Mapping[str, str]:
    """What each mark of the scatter says, by its id."""
    return {
        f"mark:{m.key}": f"{m.label}{' (not finished)' if m.partial else ''}: MaxVio "
        f"{m.estimates['maxvio'].text(3)}, validation loss {m.estimates['loss'].text(4)}"
        for m in placed(methods)
    }


def _mark(axes: Axes, m: MethodSummary) -> None:
    x, y = m.estimates["maxvio"], m.estimates["loss"]
    low, _ = _span(m, "maxvio")
    seeds = _seeds(m)
    if len(seeds) > 1:
        across, up = zip(*seeds, strict=True)
        dots = axes.scatter(across, up, s=12, color=m.look.light, alpha=0.4, lw=0)
        dots.set_gid(f"seed:{m.key}")
    mark, _, bars = axes.errorbar(
        [x.mean],
        [y.mean],
        xerr=None if x.sd is None else [[x.mean - low], [x.sd]],
        yerr=y.sd,
        color=m.look.light,
        marker=MARKS[m.look.marker],
        markeredgecolor=GROUND,
        alpha=0.5 if m.partial else None,
        elinewidth=1.3,
        ls="",
        label=plain(m.label) + (" (not finished)" if m.partial else ""),
    )
    mark.set_gid(f"mark:{m.key}")
    for bar in bars:
        bar.set_gid(f"bar:{m.key}")


def _stroke(m: MethodSummary, place: int) -> dict[str, Any]:
    """How a method's line looks; the subject, first in page order, lies on top."""
    return {
        "color": m.look.light,
        "linestyle": m.look.line,
        "label": plain(m.label),
        "zorder": 3 - place / 100,
        "gid": f"line:{m.key}",
    }


def _seeds(method: MethodSummary) -> list[tuple[float, float]]:
    """MaxVio and loss of each seed that has both."""
    across, up = method.values["maxvio"], method.values["loss"]
    return [(across[seed], up[seed]) for seed in across if seed in up]


def _span(method: MethodSummary, metric: str) -> tuple[float, float]:
    """Mean ± sd; never down to zero or below for a positive mean, which a log axis cannot show."""
    estimate = method.estimates[metric]
    sd = estimate.sd or 0.0
    low = estimate.mean - sd
    if low <= 0 < estimate.mean:
        low = min(method.values[metric].values())
    return low, estimate.mean + sd


def _at_least(axes: Axes, span: float) -> None:
    """Widen the vertical axis to a span below which differences are noise, not an order."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "linear" and high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def _box(x: float, y: float, width: float) -> Path:
    """A rectangle of a row of cells, with a little room to the next row."""
    corners = [(x, y), (x + width, y), (x + width, y + 0.95), (x, y + 0.95), (x, y)]
    return Path(corners, closed=True)


def _third(ratio: float) -> int:
    """The nearest third of a doubling within the axes."""
    return max(-_THIRDS, min(_THIRDS, round(3 * math.log2(max(ratio, 2.0 ** (-_THIRDS / 3))))))


def _around(third: int) -> str:
    around = f"{2 ** (third / 3):.2g}×"
    return f"{around} or less" if third == -_THIRDS else f"about {around}"
