"""Figures for papers, drawn from run logs by Matplotlib: PDF, SVG and PNG.

As wide as a page with two columns (7 in) or one of its columns (3.4 in), with type 42 fonts in the
PDF and 300 dots an inch in the PNG. The same runs give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moebalance.report.summary import summarise
from moebalance.runlog import Run

FORMATS = ("pdf", "svg", "png")


def write_figures(
    runs: Sequence[Run], folder: Path | str, formats: Sequence[str] = ("pdf",)
) -> list[Path]:
    """Write every figure that the runs have rows for, one file a figure and format.

    Args:
        runs: what to draw, e.g. from :func:`moebalance.runlog.find_runs`.
        folder: where the files go: `<batching>-<figure>.<format>`; made if missing.
        formats: of `pdf`, `svg` and `png`.

    Returns:
        The paths, in the order of the report.

    Raises:
        ValueError: a format is unknown, there is no run, or no run has anything to draw.
        ModuleNotFoundError: Matplotlib is missing.
    """
    formats = _known(formats)
    try:
        from moebalance.report.canvas import save
        from moebalance.report.paper_figures import FIGURES
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"figures need {error.name}: pip install 'moebalance[report]'"
        ) from error
    written = []
    for section in summarise(runs):
        prefix = re.sub(r"[^\w-]+", "-", section.batching)
        for name, draw in FIGURES.items():
            figure = draw(section)
            if figure is not None:
                paths = [Path(folder) / f"{prefix}-{name}.{ending}" for ending in formats]
                for path in paths:
                    save(figure, path)
                written += paths
    if not written:
        raise ValueError(
            "no run has a step, a load or an evaluation, so there is nothing to draw; let at least "
            "one run reach its first step"
        )
    return written


def _known(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats without blanks, capitals, dots and repetitions.

    >>> _known([" PDF", ".svg", "pdf"])
    ('pdf', 'svg')
    """
    words = tuple(dict.fromkeys(word.strip().lower().removeprefix(".") for word in formats))
    unknown = [word for word in words if word not in FORMATS]
    if unknown or not words:
        raise ValueError(
            f"cannot draw figures as {', '.join(map(repr, unknown)) or 'nothing'}; the formats "
            f"are {', '.join(FORMATS)}, several with commas: --figures pdf,svg"
        )
    return words
