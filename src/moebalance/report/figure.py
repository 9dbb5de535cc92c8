"""The figure that goes into a README: loss against MaxVio as a standalone SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moebalance.report.axes import Ink
from moebalance.report.methods import looks
from moebalance.report.plots import scatter
from moebalance.report.summary import summarise
from moebalance.runlog import Run

_INK = {"text": "#1b1f24", "muted": "#5c6570", "grid": "#e7e9ec", "paper": "#ffffff"}
_FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"


def write_figure(runs: Sequence[Run], path: Path | str) -> Path:
    """Write validation loss against MaxVio as a standalone SVG on an opaque card.

    With several batching modes, the first in the report's order is drawn.

    Raises:
        ValueError: there is no run, or none has both numbers.
    """
    section = summarise(runs)[0]
    colours = {method: look.light for method, look in looks(run.method for run in runs).items()}
    inner_width, inner_height = 720, 430
    ink = Ink(**_INK, methods=colours)
    figure = scatter(section.methods, ink, width=inner_width, height=inner_height)
    if figure is None:
        raise ValueError(
            "no run has an evaluation with both a loss and a MaxVio, so there is nothing to draw; "
            "let at least one run reach its evaluation"
        )
    size = f'width="{inner_width}" height="{inner_height}"'
    inner = figure.replace("<svg ", f'<svg x="16" y="64" {size} ', 1)
    width, height = inner_width + 32, inner_height + 76
    count = max(method.seeds for method in section.methods)
    seeds = f"mean ± sd over {count} seeds" if count > 1 else "one seed"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="{_FONT}" font-size="12" '
        'stroke-linecap="round">'
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" '
        f'fill="{_INK["paper"]}" stroke="#d5d9de"/>'
        f'<text x="22" y="32" font-size="15" font-weight="600" fill="{_INK["text"]}">'
        "Validation loss against load imbalance</text>"
        f'<text x="22" y="51" fill="{_INK["muted"]}">'
        f"{escape(section.title)}, {seeds}; down and to the left is better</text>{inner}</svg>\n",
        encoding="utf-8",
    )
    return path
