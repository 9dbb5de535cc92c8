"""Figures as files, drawn from run logs: for papers as PDF, SVG and PNG, for a README as SVG.

Those for papers are as wide as a page with two columns (7 in) or one of its columns (3.4 in), with
type 42 fonts in the PDF and 300 dots an inch in the PNG. The same runs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from moebalance.cleaning import for_page, for_path
from moebalance.files import write_text
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
    figures = _figures()
    written = []
    for section in summarise(runs):
        prefix = for_path(section.batching)
        for name, draw in figures.FIGURES.items():
            figure = draw(section)
            if figure is not None:
                paths = [Path(folder) / f"{prefix}-{name}.{ending}" for ending in formats]
                for path in paths:
                    figures.save(figure, path)
                written += paths
    if not written:
        raise ValueError(
            "no run has a step, a load or an evaluation, so there is nothing to draw; let at least "
            "one run reach its first step"
        )
    return written


def write_figure(runs: Sequence[Run], path: Path | str) -> Path:
    """Write validation loss against MaxVio as a standalone SVG on an opaque card.

    With several batching modes, the first in the report's order is drawn.

    Raises:
        ValueError: there is no run, none has both numbers, or the name is of another format.
        ModuleNotFoundError: Matplotlib is missing.
    """
    if Path(path).suffix.lower() not in (".svg", ""):  # nothing, as /dev/stdout has
        raise ValueError(
            f"{path}: this figure is an SVG, so its name must end in .svg; for figures in other "
            "formats give --figures pdf,png"
        )
    text = _figures().readme(summarise(runs)[0])
    if text is None:
        raise ValueError(
            "no run has an evaluation with both a loss and a MaxVio, so there is nothing to draw; "
            "let at least one run reach its evaluation"
        )
    return write_text(path, for_page(text))


def _figures() -> ModuleType:
    """What draws; Matplotlib is imported when it is needed, and only then."""
    try:
        from moebalance.report import figures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"figures need {error.name}: in the clone, pip install '.[report]'"
        ) from error
    return figures


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
