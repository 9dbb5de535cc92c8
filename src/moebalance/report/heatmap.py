"""Maps of load: layer × expert, and domain × expert, as SVG on one diverging scale.

Every cell is a ratio to an even share, binned to thirds of a doubling from ¼× to 4×; the page
gives each bin its colour (``h0`` … ``h12``, ``h6`` is an even share), ``dead`` to less than 1 % of
a share, ``na`` to what was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from moebalance.report.axes import Ink
from moebalance.report.loads import domain_names, layer_names, matrix, relative, source
from moebalance.report.pack import DEAD
from moebalance.runlog import Run

BINS = 13
_WIDTH = 440.0


class Cell(NamedTuple):
    """A ratio to an even share (None: not measured) and the words to show for it."""

    ratio: float | None
    words: str


def load_map(run: Run, ink: Ink, *, max_cells: int = 2000, titled: bool = True) -> str | None:
    """Layer × expert: each layer's experts from the most to the least loaded.

    Where there are more than ``max_cells``, neighbours in rank are averaged. Without ``titled``
    the cells say nothing, and neighbours of one colour may be one: it is far smaller.

    Returns None if the run logged no load.
    """
    row = source(run, "load")
    if row is None:
        return None
    layers = [layer for layer in matrix(row["load"]) if layer]
    columns = max(16, max_cells // len(layers))
    names = layer_names(run, len(layers))
    grid = [
        _binned(_ranked(relative(layer)), columns, name)
        for layer, name in zip(layers, names, strict=True)
    ]
    return _grid(grid, names, ink, "Load of every expert, relative to an even share", titled=titled)


def domain_maps(
    run: Run, ink: Ink, *, max_cells: int = 2000, titled: bool = True
) -> list[tuple[str, str]]:
    """Domain × expert for the first and the last layer: (layer's name, SVG) pairs.

    Each row says how the tokens of one domain spread over the experts, and is normalised to sum
    to one. Experts are ordered by the domain they serve most, so specialists line up as blocks.
    """
    row = source(run, "domain_load")
    if row is None:
        return []
    layers = row["domain_load"]
    names = layer_names(run, len(layers))
    maps = []
    for index in sorted({0, len(layers) - 1}):
        domains = matrix(layers[index])
        if not domains or not domains[0] or len({len(domain) for domain in domains}) > 1:
            continue
        ratios = [relative(domain) for domain in domains]
        known = domain_names(run, len(domains))
        order = by_domain(ratios)[: max(16, max_cells // len(domains))]
        grid = [
            [Cell(line[e], f"{name} → expert {e}: {_times(line[e])}") for e in order]
            for line, name in zip(ratios, known, strict=True)
        ]
        label = f"Share of each domain's tokens by expert, {names[index]}"
        maps.append((names[index], _grid(grid, known, ink, label, titled=titled)))
    return maps


def by_domain(ratios: Sequence[Sequence[float | None]]) -> list[int]:
    """Experts by the domain that they serve most, so that specialists line up as blocks."""
    return sorted(range(len(ratios[0])), key=lambda expert: _served(ratios, expert))


def colour_class(ratio: float | None) -> str:
    """The cell's CSS class.

    >>> [colour_class(r) for r in (None, 0.0, 0.25, 1.0, 2.0, 9.0)]
    ['na', 'dead', 'h0', 'h6', 'h9', 'h12']
    """
    if ratio is None:
        return "na"
    if ratio < DEAD:
        return "dead"
    middle = BINS // 2
    return f"h{min(max(round(3 * math.log2(ratio)), -middle), middle) + middle}"


def _ranked(ratios: Sequence[float | None]) -> list[tuple[int, float | None]]:
    return sorted(
        enumerate(ratios), key=lambda item: math.inf if item[1] is None else -float(item[1])
    )


def _binned(ranked: list[tuple[int, float | None]], columns: int, layer: str) -> list[Cell]:
    group = math.ceil(len(ranked) / columns)
    cells = []
    for start in range(0, len(ranked), group):
        part = ranked[start : start + group]
        known = [ratio for _, ratio in part if ratio is not None]
        ratio = math.fsum(known) / len(known) if known else None
        ranks = f"mean of ranks {start + 1} to {start + len(part)}"
        who = f"expert {part[0][0]}" if group == 1 else ranks
        cells.append(Cell(ratio, f"{layer}, {who}: {_times(ratio)}"))
    return cells


def _served(ratios: Sequence[Sequence[float | None]], expert: int) -> tuple[int, float]:
    """The domain an expert serves most, and (negated) how much more than the domains' mean."""
    column = [line[expert] or 0.0 for line in ratios]
    main = max(range(len(column)), key=column.__getitem__)
    total = math.fsum(column)
    return main, -column[main] / total if total else 0.0


def _grid(
    grid: Sequence[Sequence[Cell]], names: Sequence[str], ink: Ink, label: str, *, titled: bool
) -> str:
    height = 18.0 if len(grid) <= 8 else 12.0 if len(grid) <= 32 else 6.0
    gutter = min(6.4 * max(len(name) for name in names) + 10, 150.0)
    every = math.ceil(12 / height)
    parts = []
    for i, (cells, name) in enumerate(zip(grid, names, strict=True)):
        top, width = i * height, (_WIDTH - gutter) / len(cells)
        if i % every == 0:
            parts.append(
                f'<text x="{gutter - 8:.1f}" y="{top + height / 2 + 4:.1f}" text-anchor="end" '
                f'style="fill:{ink.muted}">{escape(name[:22])}</text>'
            )
        # A row is drawn in units of one cell; the page's style sheet gives a cell its size. That
        # keeps a cell at some sixty bytes, and a page may hold thousands.
        tight = ' class="tight"' if width < 4 else ""
        parts.append(
            f'<g{tight} transform="translate({gutter:.1f},{top:g})scale({width:.4f},{height:g})">'
        )
        if titled:
            parts.extend(
                f'<rect class="{colour_class(cell.ratio)}" x="{j}">'
                f"<title>{escape(cell.words)}</title></rect>"
                for j, cell in enumerate(cells)
            )
        else:
            parts.extend(_plain(cells, merged=bool(tight)))
        parts.append("</g>")
    size = f"0 0 {_WIDTH:g} {len(grid) * height:g}"
    return (
        f'<svg class="map" viewBox="{size}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _plain(cells: Sequence[Cell], *, merged: bool) -> Iterator[str]:
    """A row's cells without words; too narrow for gaps between them, those of one colour merge."""
    at = 0
    for colour, group in groupby(colour_class(cell.ratio) for cell in cells):
        count = sum(1 for _ in group)
        if merged:
            yield f'<rect class="{colour}" x="{at}" style="width:{count}px"/>'
        else:
            yield from (f'<rect class="{colour}" x="{at + k}"/>' for k in range(count))
        at += count


def _times(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}×"
