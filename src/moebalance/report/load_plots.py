"""Two figures of the load itself: sorted over the experts, and soft against hard."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape

from moebalance.report.axes import Axis, Ink, frame
from moebalance.report.estimates import MethodSummary
from moebalance.report.frames import mean_sorted
from moebalance.report.loads import promised_and_delivered, ratios, source
from moebalance.report.pack import DEAD
from moebalance.runlog import Run

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 40, 52
# Soft against hard, in thirds of a doubling from ⅛× to 8×; what lies beyond stands at the edge.
_THIRDS = 9
_LARGEST = 2.0


def sorted_loads(
    shown: Sequence[tuple[MethodSummary, Run]], ink: Ink, *, width: int = 640, height: int = 300
) -> str | None:
    """Load by rank, a line a method: experts from the most to the least loaded, mean over layers.

    Returns None if no run logged its load.
    """
    lines = {id(m): mean_sorted(ratios(source(run, "load"), "load")) for m, run in shown}
    longest = max(map(len, lines.values()), default=0)
    if not longest:
        return None
    x = Axis(1.0, max(longest, 2), _LEFT, width - _RIGHT)
    top = max(2.0, 1.05 * max(max(line, default=0.0) for line in lines.values()))
    y = Axis(0.0, top, height - _BOTTOM, _TOP)
    even = y.at(1.0)
    parts = [
        frame(
            x,
            y,
            ink,
            x_title="Experts, from the most to the least loaded",
            y_title="Load, multiples of an even share",
        ),
        f'<path d="M{_LEFT} {even:.1f}H{width - _RIGHT}" style="stroke:{ink.muted};'
        f'stroke-dasharray:2 3"/><text x="{width - _RIGHT}" y="{even - 6:.1f}" text-anchor="end" '
        f'style="fill:{ink.muted}">even</text>',
    ]
    for m, _ in reversed(shown):
        points = enumerate(lines[id(m)], 1)
        path = "L".join(f"{x.at(rank):.1f} {y.at(value):.1f}" for rank, value in points)
        dash = ";stroke-dasharray:5 4" if m.method == "none" else ""
        if path:
            parts.append(
                f'<g class="series" data-method="{escape(m.method)}" '
                f'data-label="{escape(m.label)}"><path class="line" d="M{path}" '
                f'style="fill:none;stroke:{ink.methods[m.method]};stroke-width:1.8;'
                f'stroke-linejoin:round{dash}"/></g>'
            )
    label = "Load by rank of the experts, one line a method"
    return (
        f'<svg class="chart sorted" viewBox="0 0 {width} {height}" role="img" tabindex="0" '
        f'aria-label="{label}" {x.attributes("x")} {y.attributes("y")}>{"".join(parts)}</svg>'
    )


def soft_against_hard(run: Run, colour: str, ink: Ink) -> str | None:
    """Where experts stand: the share their probabilities promise against the one top-k delivers.

    Each disc is a group of experts of all layers; its area says how many.

    Returns None if the run did not log both loads.
    """
    pairs = promised_and_delivered(run)
    if not pairs:
        return None
    size = 240.0
    x, y = Axis(-3.0, 3.0, 46, size - 14), Axis(-3.0, 3.0, size - 64, 28)
    nothing = y.start + 16
    counts = Counter((_third(a), _third(b) if b >= DEAD else None) for a, b in pairs)
    largest = max(counts.values())
    cell = (x.end - x.start) / (2 * _THIRDS)
    parts = [_paper(x, y, nothing, ink, size)]
    for (a, b), count in sorted(counts.items(), key=lambda item: -item[1]):
        radius = max(1.2, 0.62 * cell * _LARGEST**0.5 * math.sqrt(count / largest))
        across = x.at(a / 3)
        up = y.at(b / 3) if b is not None else nothing
        share = f"{count} of {len(pairs)} experts"
        promised = f"promised {_words(a)}"
        got = f"got {_words(b)}" if b is not None else "got nothing: dead"
        parts.append(
            f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{radius:.1f}" style="fill:{colour}">'
            f"<title>{share}: {promised}, {got}</title></circle>"
        )
    return (
        f'<svg class="discs" viewBox="0 0 {size:g} {size:g}" role="img" '
        f'aria-label="Soft against hard load of the experts">{"".join(parts)}</svg>'
    )


def _paper(x: Axis, y: Axis, nothing: float, ink: Ink, size: float) -> str:
    """Axes in doublings, the diagonal where both loads agree, and titles."""
    bottom = nothing + 10
    parts = [
        f'<path d="M{x.start:g} {y.start:g}L{x.end:g} {y.end:g}" style="stroke:{ink.muted};'
        'stroke-dasharray:2 3"/>',
        f'<path d="M{x.start:g} {bottom:g}H{x.end:g}M{x.start:g} {bottom:g}V{y.end:g}" '
        f'style="fill:none;stroke:{ink.muted}"/>',
        f'<path d="M{x.start:g} {nothing:g}H{x.end:g}" style="stroke:{ink.grid}"/>'
        f'<text x="{x.start - 7:g}" y="{nothing + 4:g}" text-anchor="end" '
        f'style="fill:{ink.muted}">0</text>',
    ]
    for value, label in ((-2, "¼×"), (0, "1×"), (2, "4×")):
        across, up = x.at(value), y.at(value)
        parts.append(
            f'<path d="M{across:.1f} {bottom:g}V{y.end:g}M{x.start:g} {up:.1f}H{x.end:g}" '
            f'style="stroke:{ink.grid}"/>'
            f'<text x="{across:.1f}" y="{bottom + 16:g}" text-anchor="middle" '
            f'style="fill:{ink.muted}">{label}</text>'
            f'<text x="{x.start - 7:g}" y="{up + 4:.1f}" text-anchor="end" '
            f'style="fill:{ink.muted}">{label}</text>'
        )
    parts.append(
        f'<text x="{x.end:g}" y="{size - 6:g}" text-anchor="end" style="fill:{ink.text}">'
        f'Soft load, promised</text><text x="4" y="14" style="fill:{ink.text}">'
        "Hard load, delivered</text>"
    )
    return "".join(parts)


def _third(ratio: float) -> int:
    """The nearest third of a doubling within the axes."""
    low = 2.0 ** (-_THIRDS / 3)
    return max(-_THIRDS, min(_THIRDS, round(3 * math.log2(max(ratio, low)))))


def _words(third: int) -> str:
    around = f"{2 ** (third / 3):.2g}×"
    return f"{around} or less" if third == -_THIRDS else f"about {around}"
