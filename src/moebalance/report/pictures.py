"""The figures of one batching mode, as the template takes them; SVG is marked safe there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moebalance.report.axes import Ink
from moebalance.report.estimates import MethodSummary, last_evaluation
from moebalance.report.frames import domain_frames, load_frames, pair_frames, strongest_pairs
from moebalance.report.heatmap import domain_maps, load_map
from moebalance.report.load_plots import soft_against_hard, sorted_loads
from moebalance.report.loads import drawn, source
from moebalance.report.plots import curves, marker, scatter, window_of
from moebalance.report.summary import Section
from moebalance.runlog import Run

_CURVES = (
    ("maxvio", "MaxVio of each step"),
    ("gini", "Gini of each step"),
    ("loss", "Training loss, nats/token"),
)


def pictures(section: Section, ink: Ink, *, still_cells: int, packed_cells: int) -> dict[str, Any]:
    """Every figure of a section; what its runs did not log is None or empty.

    Args:
        section: the batching mode.
        ink: the page's colours.
        still_cells: cells of a map drawn as SVG, for print and for browsers without script.
        packed_cells: values of a map carried for the script.
    """
    # One mark alone is compared with nothing.
    compared = section.methods if len(section.methods) > 1 else ()
    return {
        "scatter": scatter(compared, ink, height=640),
        "scatter_narrow": scatter(compared, ink, width=360, height=380, named=False),
        "curves": [
            svg
            for key, title in _CURVES
            if (svg := curves(section.methods, ink, key, title=title, height=236))
        ],
        "window": window_of(section.methods),
        "loads": _load_cards(section.methods, ink, still_cells, packed_cells),
        "sorted": sorted_loads(drawn(section.methods, "load"), ink),
        "soft_hard": [
            {**_card(m, ink, run, "soft"), "svg": svg}
            for m, run in drawn(section.methods, "soft")
            if (svg := soft_against_hard(run, ink.methods[m.method], ink))
        ],
        "domains": _domain_cards(section.methods, ink, still_cells, packed_cells // 4),
        "pairs": _pair_cards(section.methods, ink, packed_cells // 4),
    }


def _load_cards(
    methods: Sequence[MethodSummary], ink: Ink, still_cells: int, packed_cells: int
) -> list[dict[str, Any]]:
    return [
        {
            **_card(m, ink, run, "load"),
            "svg": svg,
            "pack": _text(load_frames(run, max_cells=packed_cells)),
        }
        for m, run in drawn(methods, "load")
        if (svg := load_map(run, ink, max_cells=still_cells, titled=False))
    ]


def _domain_cards(
    methods: Sequence[MethodSummary], ink: Ink, still_cells: int, packed_cells: int
) -> list[dict[str, Any]]:
    cards = []
    for m, run in drawn(methods, "domain_load"):
        maps = domain_maps(run, ink, max_cells=still_cells, titled=False)
        row = source(run, "domain_load")
        if maps and row is not None:
            packed = _text(domain_frames(run, row, max_cells=packed_cells))
            cards.append({**_card(m, ink, run, "domain_load"), "maps": maps, "pack": packed})
    return cards


def _pair_cards(
    methods: Sequence[MethodSummary], ink: Ink, packed_cells: int
) -> list[dict[str, Any]]:
    cards = []
    for m in methods:
        for run in m.used[:1]:
            row = last_evaluation(run) or {}
            packed = pair_frames(run, row, max_cells=packed_cells)
            if packed is not None:
                words = ", ".join(strongest_pairs(row))
                card = _card(m, ink, run, "load")
                cards.append({**card, "words": words, "pack": _text(packed)})
    return cards


def _text(packed: dict[str, Any] | None) -> str:
    return "" if packed is None else json.dumps(packed, ensure_ascii=False, separators=(",", ":"))


def _card(method: MethodSummary, ink: Ink, run: Run, key: str) -> dict[str, Any]:
    row = source(run, key)
    seed = "" if run.seed is None else f"seed {run.seed}, "
    return {
        "method": method.method,
        "label": method.label,
        "colour": ink.methods[method.method],
        "marker": marker(method.method),
        "seed": seed.removesuffix(", "),
        "when": f"{seed}step {row['step']}" if row else "",
    }
