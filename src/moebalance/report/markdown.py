"""The method tables as Markdown, for the documentation: the same numbers as the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moebalance.cleaning import for_markdown
from moebalance.files import write_text
from moebalance.report.before_after import BeforeAfter
from moebalance.report.columns import METRICS
from moebalance.report.configuration import what_was_run
from moebalance.report.estimates import Estimate, MethodSummary
from moebalance.report.summary import Section, summarise
from moebalance.runlog import Run


def write_markdown(runs: Sequence[Run], path: Path | str, title: str) -> Path:
    """Write verdicts and tables of the runs as one Markdown file.

    Raises:
        ValueError: there is no run.
    """
    parts = [
        f"# {for_markdown(title)}",
        "Generated from run logs by `moebalance report --markdown`; do not edit by hand.",
        for_markdown(what_was_run(runs)),
        *(_section(section) for section in summarise(runs)),
    ]
    return write_text(path, "\n\n".join(parts) + "\n")


def _section(section: Section) -> str:
    timed = any(method.step_time_ratio is not None for method in section.methods)
    columns = ["Method", *(metric.title for metric in METRICS), *(["Step time"] if timed else [])]
    rows = [_row(method)[: len(columns)] for method in section.methods]
    table = [_line(columns), _rule(len(columns)), *map(_line, rows)]
    parts = [f"## {for_markdown(section.title)}", for_markdown(section.verdict), "\n".join(table)]
    if section.before_after is not None:
        parts += ["### Before and after", *_before_after(section.before_after)]
    return "\n\n".join([*parts, *map(for_markdown, section.notes)])


def _before_after(found: BeforeAfter) -> list[str]:
    table = [
        _line(["", *(metric.title for metric in found.columns)]),
        _rule(1 + len(found.columns)),
    ]
    for line in found.lines:
        cells = zip(line.cells, found.columns, strict=True)
        table.append(_line([line.label, *(_cell(e, metric.digits) for e, metric in cells)]))
    return [part for part in (for_markdown(found.verdict), "\n".join(table)) if part]


def _row(method: MethodSummary) -> list[str]:
    cells = [method.label]
    for metric in METRICS:
        cells.append(_cell(method.estimates.get(metric.key), metric.digits))
    ratio = method.step_time_ratio
    cells.append("–" if ratio is None else f"{ratio:.2f}×")
    return cells


def _cell(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "–"
    tail = "" if estimate.sd is None else f" ± {estimate.sd:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{tail}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(for_markdown, cells)) + " |"


def _rule(columns: int) -> str:
    return "| --- |" + " ---: |" * (columns - 1)
