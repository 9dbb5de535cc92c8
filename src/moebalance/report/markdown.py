"""The method tables as Markdown, for the documentation: the same numbers as the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moebalance.report.configuration import what_was_run
from moebalance.report.estimates import MethodSummary
from moebalance.report.summary import METRICS, Section, summarise
from moebalance.runlog import Run


def write_markdown(runs: Sequence[Run], path: Path | str, title: str) -> Path:
    """Write verdicts and tables of the runs as one Markdown file.

    Raises:
        ValueError: there is no run.
    """
    parts = [
        f"# {title}",
        "Generated from run logs by `moebalance report --markdown`; do not edit by hand.",
        what_was_run(runs),
        *(_section(section) for section in summarise(runs)),
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _section(section: Section) -> str:
    columns = ["Method", *(metric.title for metric in METRICS), "Step time"]
    rows = [_row(method) for method in section.methods]
    table = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)]), *map(_line, rows)]
    return "\n\n".join([f"## {section.title}", section.verdict, "\n".join(table), *section.notes])


def _row(method: MethodSummary) -> list[str]:
    cells = [method.label]
    for metric in METRICS:
        estimate = method.estimates.get(metric.key)
        cells.append(
            "–" if estimate is None else _number(estimate.mean, estimate.sd, metric.digits)
        )
    ratio = method.step_time_ratio
    cells.append("–" if ratio is None else f"{ratio:.2f}×")
    return cells


def _number(mean: float, sd: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
