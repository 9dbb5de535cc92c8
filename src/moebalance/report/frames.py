"""What the page's script draws: loads over steps, and domains over layers, as packed frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any

from moebalance.report.loads import domain_loads, domain_names, layer_names, matrix, relative
from moebalance.report.pack import code, pack, thinned
from moebalance.runlog import Row, Run

Matrix = Sequence[Sequence[float | None]]


def load_frames(run: Run, *, max_cells: int) -> dict[str, Any] | None:
    """Layer × expert over steps: the run's snapshots, and its last evaluation as the last frame.

    Args:
        run: the run.
        max_cells: values to carry at most; snapshots are thinned out evenly to fit.

    Returns:
        `frames` (step and what it was counted over), `rows` (layers), `columns` (experts) and the
        packed codes; None if the run logged no load.
    """
    # Looked at one by one, as a long run has more of them than should be held at once.
    sizes = [_shape(row) for row in chain(run.snapshots, run.evals[-1:])]
    known = [i for i, (rows, _) in enumerate(sizes) if rows]
    # A model does not change its layers in training; rows that disagree were not written by us.
    known = [i for i in known if sizes[i][0] == sizes[known[-1]][0]]
    if not known:
        return None
    rows = sizes[known[-1]][0]
    columns = max(sizes[i][1] for i in known)
    some = [known[i] for i in thinned(len(known), max(1, max_cells // (rows * columns)))]
    last = len(run.snapshots)
    kept = [run.snapshots[i] if i < last else run.evals[-1] for i in some]
    words = ["training batches" if i < last else "evaluation" for i in some]
    return {
        "frames": [[row["step"], word] for row, word in zip(kept, words, strict=True)],
        "rows": layer_names(run, rows),
        "columns": columns,
        **pack([_codes(_ratios(row, "load"), columns) for row in kept]),
    }


def domain_frames(run: Run, row: Row, *, max_cells: int) -> dict[str, Any] | None:
    """Domain × expert, one frame a layer, from one evaluation row of the run.

    Returns:
        As :func:`load_frames`, with layers for frames and domains for rows; None if there is no
        such load, or one that is not a matrix a layer.
    """
    grids = domain_loads(row)
    shapes = {(len(grid), *{len(line) for line in grid}) for grid in grids}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or 0 in shape:
        return None
    domains, columns = shape
    names = layer_names(run, len(grids))
    kept = thinned(len(grids), max(1, max_cells // (domains * columns)))
    return {
        "frames": [[i, names[i]] for i in kept],
        "rows": domain_names(run, domains),
        "columns": columns,
        **pack([_codes(grids[i], columns) for i in kept]),
    }


def pair_frames(run: Run, row: Row, *, max_cells: int) -> dict[str, Any] | None:
    """Expert × expert, one frame a logged layer: how often two serve one token.

    Returns:
        As :func:`load_frames`, with layers for frames and experts for rows; None if the row has
        no such pairs.
    """
    found = pairs(row)
    if not found:
        return None
    columns = _experts(len(found[0][1]))
    depth = max(layer for layer, _ in found) + 1
    model = run.header.get("model")
    named = model.get("layers") if isinstance(model, dict) else None
    names = layer_names(run, len(named) if isinstance(named, list) else depth)
    kept = [found[i] for i in thinned(len(found), max(1, max_cells // columns**2))]
    return {
        "frames": [[i, names[i] if i < len(names) else f"layer {i}"] for i, _ in kept],
        "rows": [f"expert {e}" for e in range(columns)],
        "columns": columns,
        **pack([_square(lift, columns) for _, lift in kept]),
    }


def strongest_pairs(row: Row, *, most: int = 4) -> list[str]:
    """The pairs of the last logged layer that serve together most often, in words."""
    found = pairs(row)
    if not found:
        return []
    _, lift = found[-1]
    places = combinations(range(_experts(len(lift))), 2)
    known = [(x, i, j) for x, (i, j) in zip(lift, places, strict=True) if x is not None]
    return [f"{i} with {j}: {x:.1f}×" for x, i, j in sorted(known, reverse=True)[:most]]


def mean_sorted(grid: Matrix) -> list[float]:
    """Load by rank: each layer's ratios from the largest down, averaged over layers."""
    lines = [sorted((r for r in line if r is not None), reverse=True) for line in grid]
    lines = [line for line in lines if line]
    width = max(map(len, lines), default=0)
    return [
        math.fsum(line[i] for line in lines if i < len(line)) / sum(i < len(x) for x in lines)
        for i in range(width)
    ]


def ranked(layer: Sequence[float | None], most: int) -> list[float | None]:
    """A layer's ratios from the largest down; where there are more, neighbours are averaged.

    >>> ranked([1.0, None, 3.0, 0.0], 9), ranked([4.0, 2.0, 1.0, 0.0], 2)
    ([None, 3.0, 1.0, 0.0], [3.0, 0.5])
    """
    order = sorted(layer, key=lambda x: math.inf if x is None else x, reverse=True)
    group = math.ceil(len(order) / most)
    parts = (order[i : i + group] for i in range(0, len(order), group))
    known = ([x for x in part if x is not None] for part in parts)
    return [math.fsum(part) / len(part) if part else None for part in known]


def by_domain(ratios: Matrix) -> list[int]:
    """Experts by the domain that they serve most, so that specialists line up as blocks."""

    def served(expert: int) -> tuple[int, float]:
        column = [line[expert] or 0.0 for line in ratios]
        main = max(range(len(column)), key=column.__getitem__)
        total = math.fsum(column)
        return main, -column[main] / total if total else 0.0

    return sorted(range(len(ratios[0])), key=served)


def pairs(row: Row) -> list[tuple[int, list[float | None]]]:
    """Layer and lift of every pair above the diagonal; empty where the log has none we can read."""
    logged = row.get("coactivation_layers")
    if not isinstance(logged, list):
        return []
    lifts = matrix(row.get("coactivation"))
    layers = [layer for layer in logged if type(layer) is int and layer >= 0]
    lengths = {len(lift) for lift in lifts}
    whole = len(layers) == len(lifts) == len(logged) and len(lengths) == 1
    if not whole or not (length := lengths.pop()) or math.comb(_experts(length), 2) != length:
        return []
    return list(zip(layers, lifts, strict=True))


def _experts(num_pairs: int) -> int:
    """E from E (E − 1)/2 pairs."""
    return (1 + math.isqrt(1 + 8 * num_pairs)) // 2


def _square(lift: Sequence[float | None], columns: int) -> bytes:
    """The pairs as a symmetric matrix; experts that serve with nobody are not measured."""
    codes = bytearray(columns * columns)
    places = list(combinations(range(columns), 2))
    serving = {e for x, pair in zip(lift, places, strict=True) if x for e in pair}
    for x, (i, j) in zip(lift, places, strict=True):
        if {i, j} <= serving:
            codes[i * columns + j] = codes[j * columns + i] = code(x)
    return bytes(codes)


def _ratios(row: Row, key: str) -> Matrix:
    grid = [relative(line) for line in matrix(row.get(key)) if line]
    return grid if any(r is not None for line in grid for r in line) else []


def _shape(row: Row) -> tuple[int, int]:
    """How many layers a row's load has, and how many experts the largest of them."""
    grid = _ratios(row, "load")
    return len(grid), max(map(len, grid), default=0)


def _codes(grid: Matrix, columns: int) -> bytes:
    lines = (bytes(code(r) for r in line).ljust(columns, b"\0") for line in grid)
    return b"".join(lines)
