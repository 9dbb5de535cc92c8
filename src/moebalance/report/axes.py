"""Axes and ink for the figures: values to pixels, round ticks, and where the colours come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Ink:
    """The colours of a figure as CSS values: literals, or the page's variables.

    ``methods`` maps a method's key to its colour.
    """

    text: str
    muted: str
    grid: str
    paper: str
    methods: Mapping[str, str]


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from ``low`` at pixel ``start`` to ``high`` at pixel ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        start: float,
        end: float,
        *,
        log_above: float = math.inf,
        margin: float = 0.08,
    ) -> Axis:
        """An axis that holds all values with a margin at both ends.

        It is logarithmic if every value is positive and the largest is more than ``log_above``
        times the smallest.
        """
        known = list(values) or [0.0, 1.0]
        low, high = min(known), max(known)
        log = low > 0 and high / low > log_above
        if log:
            reach = (high / low) ** margin
            return cls(low / reach, high * reach, start, end, log=True)
        reach = margin * (high - low) or 0.05 * abs(high) or 1.0
        bottom = low - reach
        # Do not show negative ground for a quantity that has none.
        if low >= 0:
            bottom = max(bottom, 0.0)
        return cls(bottom, high + reach, start, end)

    def at(self, value: float) -> float:
        """The pixel of a value; values beyond the axis stay at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def attributes(self, name: str) -> str:
        """The axis as attributes of an SVG, from which the page's script reads values back.

        >>> Axis(0.0, 1.0, 62, 622).attributes("x")
        'data-x="0.0 1.0 62 622"'
        """
        log = " log" if self.log else ""
        return f'data-{name}="{self.low!r} {self.high!r} {self.start:g} {self.end:g}{log}"'

    def ticks(self, about: int = 6) -> list[tuple[float, str]]:
        """Round values on the axis, with their labels.

        >>> [label for _, label in Axis(0.0, 1.0, 0, 100).ticks()]
        ['0.0', '0.2', '0.4', '0.6', '0.8', '1.0']
        >>> [label for _, label in Axis(0.1, 8.0, 0, 100, log=True).ticks()]
        ['0.1', '0.2', '0.5', '1', '2', '5']
        """
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / about)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        digits += round(step * 10**digits, 6) % 1 != 0
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]


def frame(
    x: Axis,
    y: Axis,
    ink: Ink,
    *,
    x_title: str,
    y_title: str,
) -> str:
    """Grid, ticks and titles of a plot, as SVG."""
    left, right, bottom, top = x.start, x.end, y.start, y.end
    parts = []
    # Ticks closer than their labels are high would hide each other.
    for value, label in y.ticks(about=max(3, min(6, round((bottom - top) / 36)))):
        at = y.at(value)
        parts.append(
            f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}" style="stroke:{ink.grid}"/>'
            f'<text class="tick y" x="{left - 8:.1f}" y="{at + 4:.1f}" text-anchor="end" '
            f'style="fill:{ink.muted}">{label}</text>'
        )
    for value, label in x.ticks():
        at = x.at(value)
        parts.append(
            f'<path d="M{at:.1f} {bottom:.1f}v5" style="stroke:{ink.muted}"/>'
            f'<text class="tick x" x="{at:.1f}" y="{bottom + 19:.1f}" text-anchor="middle" '
            f'style="fill:{ink.muted}">{label}</text>'
        )
    parts.append(
        f'<path d="M{left:.1f} {bottom:.1f}H{right:.1f}" style="stroke:{ink.muted}"/>'
        f'<text x="{right:.1f}" y="{bottom + 38:.1f}" text-anchor="end" '
        f'style="fill:{ink.text}">{escape(x_title)}</text>'
        f'<text x="6" y="{top - 14:.1f}" style="fill:{ink.text}">{escape(y_title)}</text>'
    )
    return "".join(parts)


def _round_step(rough: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= rough * 0.999)


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in (tuple(range(1, 10)), (1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(found) <= 7:
            break
    return [(value, f"{value:g}") for value in found]
