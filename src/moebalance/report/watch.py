"""A run in the terminal: a line of blocks for every curve, and the load of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from moebalance.report.configuration import differences, folders
from moebalance.report.estimates import finite, number
from moebalance.report.loads import layer_names, matrix, maxvio, relative, source
from moebalance.report.naming import Name, by_setting, names
from moebalance.report.pack import DEAD
from moebalance.runlog import Run, column

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
_CURVES = (("loss", "loss", 3), ("maxvio", "MaxVio", 2), ("gini", "Gini", 2))
_MOST_LAYERS = 12
# Background colours from far too little to far too much; an even share has none.
_SHADES = ("blue", "steel_blue", "light_steel_blue", "default", "light_salmon1", "orange3", "red")


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Values as blocks from their least to their largest, in at most `width` columns.

    Neighbours are averaged where there are more; a value that is missing is a gap.

    >>> sparkline([0.0, 1.0, None, 2.0, 7.0], 9)
    '▁▂ ▃█'
    >>> sparkline([2.0, 2.0], 9)
    '▄▄'
    """
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [_mean(values[a:b]) for a, b in pairwise(edges)]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * count
    low, span = min(known), max(known) - min(known)
    top = len(BLOCKS) - 1
    return "".join(
        " " if m is None else BLOCKS[round(top * (m - low) / span) if span else top // 2]
        for m in means
    )


def view(runs: Sequence[Run], problems: Sequence[str] = (), *, width: int = 100) -> Group:
    """What `moebalance watch` shows: a table of runs, and of a single run its layers as well.

    Args:
        runs: whole or still running.
        problems: what to say about logs that cannot be read.
        width: columns of the terminal.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    narrow = width < 90
    curves = _CURVES[:2] if narrow else _CURVES
    room = max(6, min(40, (width - 52 - 9 * len(curves)) // len(curves))) if width >= 64 else 0
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    # A name is wrapped, never cut: what tells two settings apart may stand at its end.
    table.add_column("run", min_width=14, max_width=28, overflow="fold")
    table.add_column("step", justify="right", no_wrap=True)
    for _, title, _ in curves:
        table.add_column(title, no_wrap=True)
    if not narrow:
        table.add_column("left", justify="right", no_wrap=True)
    for name, run in _named(runs):
        cells = [Text(name)]
        if run is None:
            table.add_row(*cells)
            continue
        cells.append(Text(_progress(run)))
        for key, _, digits in curves:
            values = [finite({key: value}, key) for value in column(run.steps, key)]
            last = next((v for v in reversed(values) if v is not None), None)
            words = "–" if last is None else number(last, digits)
            cells.append(Text(f"{sparkline(values, room)} {words}".strip()))
        if not narrow:
            cells.append(Text(_left(run)))
        table.add_row(*cells)
    parts: list[Table | Text] = [table] if runs else []
    # Said once, under the table: next to the name it would take the numbers' room.
    common = {n.method: n.common for n in names(by_setting(runs)).values() if n.common}
    parts += [Text(f"{name}: {words} in all", style="dim") for name, words in common.items()]
    if len(runs) == 1:
        parts.append(_layers(runs[0], width))
    parts += [Text(problem, style="yellow") for problem in problems]
    return Group(*parts)


def _named(runs: Sequence[Run]) -> Iterator[tuple[str, Run | None]]:
    """What each line is called: settings of one method stand under its name, without a run."""
    found = names(by_setting(runs))
    several = len({run.batching for run in runs}) > 1
    called = [found[run.method, run.method_repr] for run in runs]
    lines = [_line(name, run, several) for name, run in zip(called, runs, strict=True)]
    keys = [(run.method, line) for run, line in zip(runs, lines, strict=True)]
    for method in dict.fromkeys(run.method for run in runs):
        alike = [i for i, run in enumerate(runs) if run.method == method]
        first = called[alike[0]]
        if first.own:
            yield first.method, None
        for i in alike:
            twins = [j for j in alike if keys[j] == keys[i]]
            more = _more([runs[j] for j in twins])[twins.index(i)] if len(twins) > 1 else ""
            yield f"{'  ' if first.own else ''}{lines[i]}{more}", runs[i]


def _line(name: Name, run: Run, batching: bool) -> str:
    seed = "" if run.seed is None else f", seed {run.seed}" if name.own else f" {run.seed}"
    return f"{name.own or name.method}{seed}{f' {run.batching}' if batching else ''}"


def _more(twins: Sequence[Run]) -> list[str]:
    """What tells twins of one setting and seed apart: an entry of the recipe, or the folder."""
    varied = differences(twins)
    words = [" ".join(f"{k.split('.')[-1]}={v}" for k, v in each.items()) for each in varied]
    few = 0 < len(varied[0]) <= 2 and len(set(words)) == len(twins)
    return [f", {text}" for text in (words if few else folders(twins))]


def _layers(run: Run, width: int) -> Text:
    """The last load that the run logged, experts of each layer from most to least loaded."""
    from rich.text import Text

    row = source(run, "load")
    # The last snapshot says more of a run in training than an evaluation long ago.
    if run.snapshots and (row is None or run.snapshots[-1]["step"] > row["step"]):
        row = run.snapshots[-1]
    text = Text()
    if row is None:
        return text
    layers = [relative(line) for line in matrix(row.get("load"))]
    called = layer_names(run, len(layers))
    kept = range(0, len(layers), max(1, math.ceil(len(layers) / _MOST_LAYERS)))
    gutter = max((len(called[i]) for i in kept), default=0) + 1
    text.append(f"\nLoad of every expert at step {row['step']}, from the most loaded: ", "dim")
    text.append("▃ even, █ 3.5× or more, · dead\n", "dim")
    for i in kept:
        ranked = sorted((r for r in layers[i] if r is not None), reverse=True)
        columns = max(1, min(len(ranked), width - gutter - 16))
        text.append(called[i].ljust(gutter), "dim")
        for j in range(columns if ranked else 0):
            ratio = ranked[j * len(ranked) // columns]
            block = BLOCKS[min(len(BLOCKS) - 1, round(2 * ratio))]
            text.append(block if ratio >= DEAD else "·", _shade(ratio))
        worst = f"  MaxVio {number(maxvio(layers[i]), 2)}" if ranked else "  –"
        text.append(f"{worst}\n")
    return text


def _shade(ratio: float) -> str:
    middle = len(_SHADES) // 2
    place = round(1.5 * math.log2(ratio)) if ratio > 0 else -middle
    return _SHADES[max(-middle, min(middle, place)) + middle]


def _progress(run: Run) -> str:
    planned = run.header.get("steps")
    state = "" if run.status == "no end row" else f" {run.status}"
    return f"{run.last_step}{f'/{planned}' if isinstance(planned, int) else ''}{state}"


def _left(run: Run) -> str:
    """The time to the planned end at the median step, as long as the run goes on."""
    planned, step_s = run.header.get("steps"), run.step_time_s
    if run.end is not None or not isinstance(planned, int) or step_s is None:
        return ""
    seconds = max(0, planned - run.last_step) * step_s
    minutes = math.ceil(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
