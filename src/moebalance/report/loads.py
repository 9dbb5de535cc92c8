"""Loads as a run log has them: where to find them, as ratios to an even share, and their names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from moebalance.report.estimates import MethodSummary
from moebalance.runlog import Row, Run


def source(run: Run, key: str) -> Row | None:
    """The row to draw ``key`` from: the last evaluation in training, else the last snapshot."""
    later = [row for row in run.evals if row["step"] > 0]
    for row in chain(reversed(later), reversed(run.snapshots)):
        value = row.get(key)
        if isinstance(value, list) and value and all(isinstance(x, list) and x for x in value):
            return row
    return None


def drawn(methods: Sequence[MethodSummary], key: str) -> list[tuple[MethodSummary, Run]]:
    """Each method with the run to draw from: experts have no identity across seeds, so one run."""
    found = []
    for method in methods:
        runs = sorted(method.used or method.runs, key=lambda run: (run.seed is None, run.seed or 0))
        run = next((run for run in (*runs, *method.runs) if source(run, key)), None)
        if run is not None:
            found.append((method, run))
    return found


def ratios(row: Row | None, key: str) -> list[list[float | None]]:
    """The row's loads, layer by layer, as multiples of an even share; empty without a row."""
    return [relative(line) for line in matrix(row.get(key))] if row is not None else []


def promised_and_delivered(run: Run) -> list[tuple[float, float]]:
    """Soft and hard load of every expert of every layer that logged both."""
    row = source(run, "soft")
    return [
        (a, b)
        for soft, hard in zip(ratios(row, "soft"), ratios(row, "load"), strict=False)
        for a, b in zip(soft, hard, strict=False)
        if a is not None and b is not None
    ]


def domain_loads(row: Row | None) -> list[list[list[float | None]]]:
    """Domain × expert of each layer, as multiples of an even share; empty where it is no matrix."""
    grids = [matrix(layer) for layer in (row or {}).get("domain_load") or []]
    return [
        [relative(line) for line in grid] if len({len(line) for line in grid} - {0}) == 1 else []
        for grid in grids
    ]


def matrix(value: Any) -> list[list[float | None]]:
    """Lists of numbers, with whatever is not a finite number as None."""
    if not isinstance(value, list):
        return []
    return [
        [float(x) if isinstance(x, int | float) and math.isfinite(x) else None for x in line]
        for line in value
        if isinstance(line, list)
    ]


def relative(shares: Sequence[float | None]) -> list[float | None]:
    """Each share as a multiple of their mean; None where not measured, or all of them are zero.

    >>> relative([0.5, 0.25, None, 0.0])
    [2.0, 1.0, None, 0.0]
    """
    known = [share for share in shares if share is not None]
    mean = math.fsum(known) / len(known) if known else 0.0
    return [None if share is None or mean <= 0 else share / mean for share in shares]


def maxvio(shares: Sequence[float | None]) -> float:
    """How far the largest share lies above the mean one, relative to it; nan without a share.

    >>> maxvio([0.5, 0.25, 0.25, 0.0])
    1.0
    """
    known = [ratio for ratio in relative(shares) if ratio is not None]
    return max(known) - 1 if known else math.nan


def layer_names(run: Run, count: int) -> list[str]:
    """``layer 3`` from a module's name such as ``model.layers.3.mlp.gate``."""
    model = run.header.get("model")
    layers = model.get("layers") if isinstance(model, dict) else None
    if not isinstance(layers, list) or len(layers) != count:
        layers = [str(i) for i in range(count)]
    found = [re.search(r"\d+", str(layer)) for layer in layers]
    return [f"layer {match[0] if match else i}" for i, match in enumerate(found)]


def domain_names(run: Run, count: int) -> list[str]:
    """The domains that the header names, or their numbers."""
    data = run.header.get("data")
    domains = data.get("domains") if isinstance(data, dict) else None
    if not isinstance(domains, list) or len(domains) != count:
        return [f"domain {i}" for i in range(count)]
    return [str(domain) for domain in domains]
