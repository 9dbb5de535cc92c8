"""The report: one HTML file with everything inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from moebalance.cleaning import for_page
from moebalance.files import write_text
from moebalance.report.columns import METRICS, Metric
from moebalance.report.configuration import run_rows, settings, what_was_run
from moebalance.report.cost import CostCell
from moebalance.report.diagnosis import counted, judge
from moebalance.report.estimates import Estimate, MethodSummary, number
from moebalance.report.methods import leader
from moebalance.report.summary import Section, summarise
from moebalance.runlog import Run

# Cells that a page draws as SVG, and values that it carries for its script: what keeps it light.
_STILL_CELLS = 12_000
_PACKED_CELLS = 400_000


def write_report(runs: Sequence[Run], path: Path | str, title: str | None = None) -> Path:
    """Write the runs' report as one HTML file that needs nothing else, not even a network.

    Args:
        runs: what to report, e.g. from :func:`moebalance.runlog.find_runs`.
        path: the file to write; its folder is made if missing.
        title: the page's title; by default the runs' names.

    Returns:
        The path of the file.

    Raises:
        ValueError: there is no run.
        ModuleNotFoundError: jinja2 or Matplotlib is missing.
    """
    return write_text(path, render_report(runs, title))


def render_report(
    runs: Sequence[Run],
    title: str | None = None,
    *,
    stamp: str | None = None,
    problems: Sequence[str] = (),
) -> str:
    """The page as text.

    Args:
        runs: what to report.
        title: the page's title; by default the runs' names.
        stamp: what the server says as long as nothing has changed; None for a page that stays.
        problems: what to say on top, such as logs that cannot be read.

    Raises:
        ValueError: there is no run.
        ModuleNotFoundError: jinja2 or Matplotlib is missing.
    """
    sections = summarise(runs)
    drawing = _drawing()
    look = {m.look.light: m.look for section in sections for m in section.methods}
    paint = {light: f"var(--m{i})" for i, light in enumerate(look)}
    methods = sum(len(section.methods) for section in sections)
    cells = {
        "still_cells": max(256, _STILL_CELLS // (3 * methods)),
        "packed_cells": _PACKED_CELLS // methods,
    }
    names = dict.fromkeys(str(run.header.get("name") or "unnamed") for run in runs)
    return _render(
        title=title or f"Load balancing: {', '.join(names)}",
        lede=what_was_run(runs),
        stamp=stamp,
        problems=problems,
        palette=list(enumerate(look.values())),
        paint=paint,
        shape=drawing.shape_of,
        sections=[
            _section(section) | drawing.pictures(section, paint, **cells) for section in sections
        ],
        metrics=METRICS,
        shades=range(13),
        runs=run_rows(runs),
        method_reprs=_method_reprs(sections),
        settings=settings(runs),
    )


def _drawing() -> ModuleType:
    """What draws; Matplotlib is imported when a page is made, and only then."""
    try:
        from moebalance.report import pictures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the report needs {error.name}: in the clone, pip install '.[report]'"
        ) from error
    return pictures


def _render(**values: Any) -> str:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the report needs jinja2: in the clone, pip install '.[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return for_page(environment.get_template("page.html.j2").render(**values))


def _section(section: Section) -> dict[str, Any]:
    """What the template needs of one batching mode beside its pictures."""
    floor = section.floor
    return {
        "title": section.title,
        "about": section.about,
        "verdict": _tied(section.verdict),
        "notes": section.notes,
        "columns": [m for m in METRICS if any(m.key in s.estimates for s in section.methods)],
        "timed": any(m.step_time_s is not None for m in section.methods),
        "slots": section.num_slots,
        "before_after": _before_after(section),
        "cost": _cost(section),
        "findings": _findings(section),
        "floor": None if floor is None else number(floor, 2 if floor >= 0.1 else 3),
        "rows": [_row(method) for method in section.methods],
        "lead": leader(m.method for m in section.methods),
        "legend": section.methods,
    }


def _tied(sentence: str) -> str:
    """Keep a number and its uncertainty or unit on one line."""
    return sentence.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u202f%")


def _row(method: MethodSummary) -> dict[str, Any]:
    ratio, time_s = method.step_time_ratio, method.step_time_s
    time = {"sort": "", "mean": "—", "below": ""}
    if time_s is not None:
        milliseconds = f"{1000 * time_s:.3g} ms"
        time = {"sort": repr(time_s), "mean": milliseconds, "below": ""}
        if ratio is not None:
            time |= {"mean": f"{ratio:.2f}×", "below": milliseconds}
    cells = {m.key: _cell(method.estimates.get(m.key), m) for m in METRICS}
    return {"method": method, "cells": cells, "time": time}


def _cost(section: Section) -> dict[str, Any] | None:
    """The table of what imbalance would cost on several ranks."""
    found = section.cost
    if found is None:
        return None
    rows = [{"method": line.method, "cells": map(_cost_cell, line.cells)} for line in found.lines]
    return {"sizes": found.ep_sizes, "caption": found.caption, "rows": rows}


def _findings(section: Section) -> dict[str, Any] | None:
    """What the doctor says of the section's methods; None where it finds nothing wrong."""
    found = judge(section.methods)
    if not (words := counted(found)):
        return None
    return {"counted": words, "rows": sorted(found, key=lambda d: d.severity.rank)}


def _cost_cell(cell: CostCell | None) -> dict[str, str]:
    if cell is None:
        return {"mean": "—", "below": ""}
    waits = f"placed {cell.placed.mean:.2f} · waits {100 * cell.wasted_share.mean:.0f} %"
    return {"mean": cell.rank_violation.text(2), "below": _tied(waits)}


def _before_after(section: Section) -> dict[str, Any] | None:
    found = section.before_after
    if found is None:
        return None
    rows = [
        {
            "label": line.label,
            "method": line.method,
            "cells": [
                _cell(e, metric) for e, metric in zip(line.cells, found.columns, strict=True)
            ],
        }
        for line in found.lines
    ]
    return {"verdict": _tied(found.verdict), "columns": found.columns, "rows": rows}


def _cell(estimate: Estimate | None, metric: Metric) -> dict[str, str]:
    if estimate is None:
        return {"sort": "", "mean": "—", "below": ""}
    digits = metric.digits
    if metric.key.endswith("dead_experts") and estimate.mean.is_integer() and not estimate.sd:
        digits = 0
    below = "" if estimate.sd is None else f"± {number(estimate.sd, digits)}"
    return {"sort": repr(estimate.mean), "mean": number(estimate.mean, digits), "below": below}


def _method_reprs(sections: Sequence[Section]) -> list[tuple[str, str]]:
    found = {(m.label, m.method_repr): None for s in sections for m in s.methods if m.method_repr}
    return list(found)
