"""The report: one HTML file with everything inside, and the figure that goes into a README."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from moebalance.report.axes import Ink
from moebalance.report.columns import METRICS, Metric
from moebalance.report.configuration import run_rows, settings, what_was_run
from moebalance.report.cost import CostCell
from moebalance.report.estimates import Estimate, MethodSummary, number
from moebalance.report.heatmap import BINS, domain_maps, load_map, source
from moebalance.report.methods import Look, display_name, looks
from moebalance.report.plots import curves, marker, scatter, window_of
from moebalance.report.summary import Section, summarise
from moebalance.runlog import Run

_CELLS_PER_PAGE = 6000
_FIGURE_INK = {"text": "#1b1f24", "muted": "#5c6570", "grid": "#e7e9ec", "paper": "#ffffff"}
_FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"


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
        ModuleNotFoundError: jinja2 is missing.
    """
    sections = summarise(runs)
    look = looks(run.method for run in runs)
    variables = {method: f"var(--m{i})" for i, method in enumerate(look)}
    ink = Ink("var(--ink)", "var(--muted)", "var(--grid)", "var(--paper)", variables)
    methods = sum(len(section.methods) for section in sections)
    cells = max(256, _CELLS_PER_PAGE // (3 * methods))
    names = dict.fromkeys(str(run.header.get("name") or "unnamed") for run in runs)
    html = _render(
        title=title or f"Load balancing: {', '.join(names)}",
        lede=what_was_run(runs),
        palette=list(enumerate(look.values())),
        sections=[_section(section, ink, look, cells) for section in sections],
        metrics=METRICS,
        scale=range(BINS),
        runs=run_rows(runs),
        balancers=_balancers(sections),
        settings=settings(runs),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def write_figure(runs: Sequence[Run], path: Path | str) -> Path:
    """Write validation loss against MaxVio as a standalone SVG on an opaque card.

    With several batching modes, the first in the report's order is drawn.

    Raises:
        ValueError: there is no run, or none has both numbers.
    """
    section = summarise(runs)[0]
    colours = {method: look.light for method, look in looks(run.method for run in runs).items()}
    inner_width, inner_height = 720, 430
    ink = Ink(**_FIGURE_INK, methods=colours)
    figure = scatter(section.methods, ink, width=inner_width, height=inner_height)
    if figure is None:
        raise ValueError(
            "no run has an evaluation with both a loss and a MaxVio, so there is nothing to draw; "
            "let at least one run reach its evaluation"
        )
    size = f'width="{inner_width}" height="{inner_height}"'
    inner = figure.replace("<svg ", f'<svg x="16" y="64" {size} ', 1)
    width, height = inner_width + 32, inner_height + 76
    count = max(len(method.used) for method in section.methods)
    seeds = f"mean ± sd over {count} seeds" if count > 1 else "one seed"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="{_FONT}" font-size="12" '
        'stroke-linecap="round">'
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" '
        f'fill="{_FIGURE_INK["paper"]}" stroke="#d5d9de"/>'
        f'<text x="22" y="32" font-size="15" font-weight="600" fill="{_FIGURE_INK["text"]}">'
        "Validation loss against load imbalance</text>"
        f'<text x="22" y="51" fill="{_FIGURE_INK["muted"]}">'
        f"{escape(section.title)}, {seeds}; down and to the left is better</text>{inner}</svg>\n",
        encoding="utf-8",
    )
    return path


def _render(**values: Any) -> str:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the report needs jinja2: pip install 'moebalance[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(**values)


def _section(section: Section, ink: Ink, look: dict[str, Look], cells: int) -> dict[str, Any]:
    """What the template needs of one batching mode. SVG strings are marked safe in the template."""
    present = [method for method in look if any(m.method == method for m in section.methods)]
    floor = section.floor
    return {
        "title": section.title,
        "about": section.about,
        "verdict": _tied(section.verdict),
        "notes": section.notes,
        "columns": [m for m in METRICS if any(m.key in s.estimates for s in section.methods)],
        "timed": any(m.step_time_s is not None for m in section.methods),
        "slots": section.num_slots,
        "before_after": _before_after(section, ink),
        "cost": _cost(section, ink),
        "floor": None if floor is None else number(floor, 2 if floor >= 0.1 else 3),
        "rows": [_row(method, section, ink) for method in section.methods],
        "legend": [(m, display_name(m), ink.methods[m], marker(m)) for m in present],
        "scatter": scatter(section.methods, ink),
        "scatter_narrow": scatter(section.methods, ink, width=360, height=380, named=False),
        "curves": curves(section.methods, ink),
        "window": window_of(section.methods),
        "loads": [
            {**_card(method, ink, run, "load"), "svg": svg}
            for method in section.methods
            if (run := _picture_run(method, "load"))
            and (svg := load_map(run, ink, max_cells=cells))
        ],
        "domains": [
            {**_card(method, ink, run, "domain_load"), "maps": maps}
            for method in section.methods
            if (run := _picture_run(method, "domain_load"))
            and (maps := domain_maps(run, ink, max_cells=cells))
        ],
    }


def _tied(sentence: str) -> str:
    """Keep a number and its uncertainty or unit on one line."""
    return sentence.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u202f%")


def _row(method: MethodSummary, section: Section, ink: Ink) -> dict[str, Any]:
    ratio, time_s = method.step_time_ratio, method.step_time_s
    time = {"sort": "", "mean": "—", "below": ""}
    if time_s is not None:
        milliseconds = f"{1000 * time_s:.3g} ms"
        time = {"sort": repr(time_s), "mean": milliseconds, "below": ""}
        if ratio is not None:
            time |= {"mean": f"{ratio:.2f}×", "below": milliseconds}
    return {
        "method": method.method,
        "label": method.label,
        "balancer": method.balancer,
        "colour": ink.methods[method.method],
        "marker": marker(method.method),
        "partial": method.partial,
        "seeds": len(method.used),
        "cells": {m.key: _cell(method.estimates.get(m.key), m) for m in METRICS},
        "time": time,
    }


def _cost(section: Section, ink: Ink) -> dict[str, Any] | None:
    """The table of what imbalance would cost on several ranks."""
    found = section.cost
    if found is None:
        return None
    rows = []
    for line in found.lines:
        method = line.method.method
        cells = [_cost_cell(cell) for cell in line.cells]
        look = {"colour": ink.methods[method], "marker": marker(method)}
        rows.append({"label": line.method.label, **look, "cells": cells})
    return {"sizes": found.ep_sizes, "caption": found.caption, "rows": rows}


def _cost_cell(cell: CostCell | None) -> dict[str, str]:
    if cell is None:
        return {"mean": "—", "below": ""}
    waits = f"placed {cell.placed.mean:.2f} · waits {100 * cell.wasted_share.mean:.0f} %"
    return {"mean": cell.rank_violation.text(2), "below": _tied(waits)}


def _before_after(section: Section, ink: Ink) -> dict[str, Any] | None:
    found = section.before_after
    if found is None:
        return None
    return {
        "verdict": _tied(found.verdict),
        "columns": found.columns,
        "rows": [
            {
                "label": line.label,
                "colour": ink.methods[line.method.method] if line.method else "",
                "marker": marker(line.method.method) if line.method else "",
                "cells": [
                    _cell(estimate, metric)
                    for estimate, metric in zip(line.cells, found.columns, strict=True)
                ],
            }
            for line in found.lines
        ],
    }


def _cell(estimate: Estimate | None, metric: Metric) -> dict[str, str]:
    if estimate is None:
        return {"sort": "", "mean": "—", "below": ""}
    digits = metric.digits
    if metric.key.endswith("dead_experts") and estimate.mean.is_integer() and not estimate.sd:
        digits = 0
    below = "" if estimate.sd is None else f"± {number(estimate.sd, digits)}"
    return {"sort": repr(estimate.mean), "mean": number(estimate.mean, digits), "below": below}


def _picture_run(method: MethodSummary, key: str) -> Run | None:
    """The run to draw maps from: experts have no identity across seeds, so one run, not a mean."""
    runs = sorted(method.used or method.runs, key=lambda run: (run.seed is None, run.seed or 0))
    return next((run for run in (*runs, *method.runs) if source(run, key)), None)


def _card(method: MethodSummary, ink: Ink, run: Run, key: str) -> dict[str, Any]:
    row = source(run, key)
    seed = "" if run.seed is None else f"seed {run.seed}, "
    return {
        "method": method.method,
        "label": method.label,
        "colour": ink.methods[method.method],
        "marker": marker(method.method),
        "when": f"{seed}step {row['step']}" if row else "",
    }


def _balancers(sections: Sequence[Section]) -> list[tuple[str, str]]:
    found = {(m.label, m.balancer): None for s in sections for m in s.methods if m.balancer}
    return list(found)
