"""The pictures of one batching mode, as the page's template takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D

from moebalance.report import draw
from moebalance.report.canvas import MUTED, plain, sheet
from moebalance.report.embed import THEME, picture, shape_of
from moebalance.report.estimates import MethodSummary, last_evaluation
from moebalance.report.frames import (
    by_domain,
    domain_frames,
    load_frames,
    mean_sorted,
    pair_frames,
    ranked,
    strongest_pairs,
)
from moebalance.report.loads import (
    domain_loads,
    domain_names,
    drawn,
    layer_names,
    promised_and_delivered,
    ratios,
    source,
)
from moebalance.report.summary import Section
from moebalance.runlog import Run

__all__ = ["pictures", "plane", "shape_of"]

Paint = Mapping[str, str]
_CURVES = (
    ("maxvio", "MaxVio of each step"),
    ("gini", "Gini of each step"),
    ("loss", "Training loss, nats/token"),
)
_MAP = 440


def pictures(
    section: Section, paint: Paint, *, still_cells: int, packed_cells: int
) -> dict[str, Any]:
    """Every figure of a section; what its runs did not log is None or empty.

    Args:
        section: the batching mode.
        paint: CSS colours of the methods, by the ones that Matplotlib draws with.
        still_cells: cells of a map for print and for browsers without script.
        packed_cells: values of a map carried for the script.
    """
    paint = {**THEME, **paint}
    # One mark alone is compared with nothing.
    compared = draw.placed(section.methods) if len(section.methods) > 1 else []
    return {
        "scatter": plane(compared, 640, 640 if len(compared) > 4 else 440, paint),
        "scatter_narrow": plane(compared, 360, 380 + 22 * len(compared), paint),
        "curves": [
            svg for key, title in _CURVES if (svg := _course(section.methods, key, title, paint))
        ],
        "window": draw.window_of(section.methods),
        "loads": _load_cards(section.methods, paint, still_cells, packed_cells),
        "sorted": _ranks(section.methods, paint),
        "soft_hard": _cloud_cards(section.methods, paint),
        "domains": _domain_cards(section.methods, paint, still_cells, packed_cells // 4),
        "pairs": _pair_cards(section.methods, packed_cells // 4),
    }


def plane(
    methods: Sequence[MethodSummary], width: int, height: int, paint: Paint | None
) -> str | None:
    """Loss against MaxVio with a name next to every mark; None without a mark."""
    if not methods:
        return None
    label = "Validation loss against global MaxVio, one mark a method"
    with sheet(width, height) as (figure, axes):
        axes.margins(x=0.12, y=0.08)
        draw.scatter(axes, methods)
        axes.set_title("Validation loss, nats/token", x=-0.08)
        draw.write_names(axes, methods)
        return picture(figure, label, methods=methods, paint=paint, say=draw.titles(methods))


def _course(methods: Sequence[MethodSummary], key: str, title: str, paint: Paint) -> str | None:
    with sheet(470, 236) as (figure, axes):
        if not draw.course(axes, methods, key, draw.window_of(methods)):
            return None
        axes.set_title(title + (", log scale" if axes.get_yscale() == "log" else ""), x=-0.1)
        label = f"{title}, one line a method"
        return picture(figure, label, css="chart", methods=methods, paint=paint, scales=axes)


def _ranks(methods: Sequence[MethodSummary], paint: Paint) -> str | None:
    lines = [
        (m, line)
        for m, run in drawn(methods, "load")
        if (line := mean_sorted(ratios(source(run, "load"), "load")))
    ]
    if not lines:
        return None
    label = "Load by rank of the experts, one line a method"
    with sheet(640, 300) as (figure, axes):
        draw.ranks(axes, lines)
        axes.set_title("Load, multiples of an even share", x=-0.08)
        return picture(figure, label, css="chart sorted", methods=methods, paint=paint, scales=axes)


def _map(
    rows: Sequence[Sequence[float | None]], names: Sequence[str], label: str, paint: Paint
) -> str:
    line = 18 if len(rows) <= 8 else 12 if len(rows) <= 32 else 6
    figure = Figure(figsize=(_MAP / 72, len(rows) * line / 72), dpi=72, facecolor="none")
    gutter = min(6.6 * max(map(len, names)) + 10, 150.0)
    # No axes: on a page of many maps, their ticks would cost more time than all the rest.
    place = Affine2D().scale((_MAP - gutter) / max(map(len, rows)), -line)
    for patch in draw.cells(rows):
        patch.set_transform(place + Affine2D().translate(gutter, len(rows) * line))
        figure.add_artist(patch)
    for i in range(0, len(rows), math.ceil(12 / line)):
        at = ((gutter - 8) / _MAP, 1 - (i + 0.5) / len(rows))
        figure.text(*at, plain(names[i], 22), ha="right", va="center", color=MUTED, size=11)
    return picture(figure, label, css="map", paint=paint)


def _load_cards(
    methods: Sequence[MethodSummary], paint: Paint, still_cells: int, packed_cells: int
) -> list[dict[str, Any]]:
    cards = []
    for m, run in drawn(methods, "load"):
        layers = [layer for layer in ratios(source(run, "load"), "load") if layer]
        rows = [ranked(layer, max(16, still_cells // len(layers))) for layer in layers]
        label = f"{m.label}: load of every expert, relative to an even share"
        still = _map(rows, layer_names(run, len(rows)), label, paint)
        packed = _text(load_frames(run, max_cells=packed_cells))
        cards.append({**_card(m, run, "load"), "svg": still, "pack": packed})
    return cards


def _cloud_cards(methods: Sequence[MethodSummary], paint: Paint) -> list[dict[str, Any]]:
    cards = []
    for m, run in drawn(methods, "soft"):
        if pairs := promised_and_delivered(run):
            cards.append({**_card(m, run, "soft"), "svg": discs(pairs, m.look.light, paint)})
    return cards


def discs(pairs: Sequence[tuple[float, float]], colour: str, paint: Paint) -> str:
    """The soft load of experts against their hard one."""
    label = "Soft against hard load of the experts"
    with sheet(240, 240) as (figure, axes):
        axes.set_position((40 / 240, 44 / 240, 186 / 240, 164 / 240))
        words = draw.cloud(axes, pairs, colour)
        axes.set_title("Hard load, delivered", x=-0.2)
        axes.set_xlabel("Soft load, promised")
        return picture(figure, label, css="discs", paint=paint, say={"disc": words})


def _domain_cards(
    methods: Sequence[MethodSummary], paint: Paint, still_cells: int, packed_cells: int
) -> list[dict[str, Any]]:
    cards = []
    for m, run in drawn(methods, "domain_load"):
        row = source(run, "domain_load")
        found = domain_loads(row)
        names = layer_names(run, len(found))
        maps = []
        for i in sorted({0, len(found) - 1}):
            if grid := found[i]:
                order = by_domain(grid)[: max(16, still_cells // len(grid))]
                rows = [[line[e] for e in order] for line in grid]
                label = f"{m.label}: share of each domain's tokens by expert, {names[i]}"
                maps.append((names[i], _map(rows, domain_names(run, len(rows)), label, paint)))
        if maps and row is not None:
            packed = _text(domain_frames(run, row, max_cells=packed_cells))
            cards.append({**_card(m, run, "domain_load"), "maps": maps, "pack": packed})
    return cards


def _pair_cards(methods: Sequence[MethodSummary], packed_cells: int) -> list[dict[str, Any]]:
    cards = []
    for m in methods:
        for run in m.used[:1]:
            row = last_evaluation(run) or {}
            packed = pair_frames(run, row, max_cells=packed_cells)
            if packed is not None:
                words = ", ".join(strongest_pairs(row))
                card = _card(m, run, "load")
                size = {"experts": packed["columns"]}
                cards.append({**card, **size, "words": words, "pack": _text(packed)})
    return cards


def _text(packed: dict[str, Any] | None) -> str:
    return "" if packed is None else json.dumps(packed, ensure_ascii=False, separators=(",", ":"))


def _card(method: MethodSummary, run: Run, key: str) -> dict[str, Any]:
    row = source(run, key)
    seed = "" if run.seed is None else f"seed {run.seed}, "
    return {"method": method, "when": f"{seed}step {row['step']}" if row else ""}
