"""Fine-tuning at a glance: loss and expert use before the first step and after the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moebalance.report.columns import NEW_TEXT, OLD_TEXT, Metric
from moebalance.report.estimates import Estimate, MethodSummary
from moebalance.report.verdict import listed, paired


@dataclass(frozen=True)
class Line:
    """One row: what it is of, the method it belongs to (None for a start), a number a column."""

    label: str
    method: MethodSummary | None
    cells: tuple[Estimate | None, ...]


@dataclass(frozen=True)
class BeforeAfter:
    """The table and the sentence over it, empty where nothing can be said."""

    columns: tuple[Metric, ...]
    lines: tuple[Line, ...]
    verdict: str


def before_after(methods: Sequence[MethodSummary]) -> BeforeAfter | None:
    """Compare the evaluations before the first step with the last ones; None without any.

    Methods that start from the same numbers, as a rule all, share one line for them.
    """
    shown = [m for m in methods if m.before]
    if not shown:
        return None
    columns = tuple(
        metric
        for metric in (*NEW_TEXT, *OLD_TEXT)
        if any(metric.key in m.before or metric.key in m.estimates for m in shown)
    )
    starts: dict[tuple[str, ...], list[MethodSummary]] = {}
    for m in shown:
        cells = (m.before.get(metric.key) for metric in columns)
        same = tuple(
            c.text(metric.digits) if c else "" for c, metric in zip(cells, columns, strict=True)
        )
        starts.setdefault(same, []).append(m)
    lines = []
    for group in starts.values():
        names = "" if len(starts) == 1 else f" ({listed([m.label for m in group])})"
        first = tuple(_start(group[0].before.get(metric.key)) for metric in columns)
        lines.append(Line(f"Before{names}", None, first))
    for m in shown:
        lines.append(Line(m.label, m, tuple(m.estimates.get(metric.key) for metric in columns)))
    return BeforeAfter(columns, tuple(lines), _forgetting([m for m in shown if not m.partial]))


def _start(estimate: Estimate | None) -> Estimate | None:
    """One checkpoint gives one number, whatever the seed: that is no sample to have a spread."""
    return replace(estimate, sd=None) if estimate is not None and not estimate.sd else estimate


def _forgetting(methods: Sequence[MethodSummary]) -> str:
    """Which methods forgot less or more than none, by paired differences."""
    baseline = next((m for m in methods if m.method == "none"), None)
    if baseline is None:
        return ""
    theirs = baseline.values.get("old_loss", {})
    found = [
        (m.label, difference.sign)
        for m in methods
        if m is not baseline
        if (difference := paired(m.values.get("old_loss", {}), theirs)) is not None
        if difference.sign is not None
    ]
    if not found:
        return ""
    words = {-1: "lower under", 1: "higher under", 0: "within seed noise under"}
    parts = [
        f"{word} {listed([label for label, s in found if s == sign])}"
        for sign, word in words.items()
        if any(s == sign for _, s in found)
    ]
    caveat = f" (95 % each, uncorrected for {len(found)} comparisons)" if len(found) > 1 else ""
    return f"Relative to no balancing, the final loss on the old text is {listed(parts)}{caveat}."
