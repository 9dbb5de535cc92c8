"""What a set of runs shows, as plain values: sections, rows, verdicts and the notes under them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebalance.report.before_after import BeforeAfter, before_after
from moebalance.report.columns import METRICS, OLD_TEXT
from moebalance.report.cost import CostTable, cost_table
from moebalance.report.estimates import (
    MethodSummary,
    finite,
    is_whole,
    last_evaluation,
    method_summaries,
)
from moebalance.report.verdict import verdict
from moebalance.runlog import Run

_BATCHINGS = {
    "mixed": ("Mixed micro-batches", "Every micro-batch draws from all domains."),
    "one-domain": (
        "One-domain micro-batches",
        "Every micro-batch comes from a single domain, so balance within it is not what matters.",
    ),
    "shift": (
        "A change of text half-way",
        "The first half of the run reads half of the domains, the second half reads the others; "
        "the evaluation holds all of them.",
    ),
    "unspecified": ("Runs", ""),
}


@dataclass(frozen=True)
class Section:
    """One batching mode: its methods in page order, its verdict, and the notes under it.

    ``before_after`` is there for fine-tuning runs only.
    """

    batching: str
    title: str
    about: str
    methods: tuple[MethodSummary, ...]
    verdict: str
    before_after: BeforeAfter | None
    cost: CostTable | None
    notes: tuple[str, ...]
    num_slots: int | None
    floor: float | None


def summarise(runs: Sequence[Run]) -> tuple[Section, ...]:
    """Aggregate runs over seeds, one section for each batching mode.

    Args:
        runs: one or more runs, whole or not; none is dropped without a note.

    Raises:
        ValueError: there is no run.
    """
    if not runs:
        raise ValueError("there is no run to report; give at least one run directory")
    present = {run.batching for run in runs}
    order = [mode for mode in _BATCHINGS if mode in present] + sorted(present - _BATCHINGS.keys())
    return tuple(
        _section(mode, [run for run in runs if run.batching == mode], runs) for mode in order
    )


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One plain dict for each batching mode and method, for a terminal or a test to print.

    Keys: ``batching method label seeds partial``, then for every metric its mean and ``…_sd``
    (None where not measured, or with one seed), ``step_time_s`` and ``step_time_ratio``. The
    validation loss is called ``val_loss``.
    """
    rows = []
    for section in summarise(runs):
        for method in section.methods:
            row: dict[str, Any] = {
                "batching": section.batching,
                "method": method.method,
                "label": method.label,
                "seeds": method.seeds,
                "partial": method.partial,
            }
            for metric in METRICS:
                estimate = method.estimates.get(metric.key)
                key = "val_loss" if metric.key == "loss" else metric.key
                row[key] = estimate.mean if estimate else None
                row[f"{key}_sd"] = estimate.sd if estimate else None
            row |= {"step_time_s": method.step_time_s, "step_time_ratio": method.step_time_ratio}
            rows.append(row)
    return rows


def _section(batching: str, runs: Sequence[Run], among: Sequence[Run]) -> Section:
    keys = [metric.key for metric in (*METRICS, *OLD_TEXT)]
    methods = tuple(method_summaries(runs, keys, among))
    title, about = _BATCHINGS.get(batching, (f"{batching} micro-batches", ""))
    slots = {_num_slots(run) for run in runs}
    floors = {_floor(run) for method in methods for run in method.used}
    return Section(
        batching=batching,
        title=title,
        about=about,
        methods=methods,
        verdict=verdict(methods),
        before_after=before_after(methods),
        cost=cost_table(methods),
        notes=tuple(_notes(runs, methods)),
        num_slots=slots.pop() if len(slots) == 1 else None,
        floor=floors.pop() if len(floors) == 1 else None,
    )


def _notes(runs: Sequence[Run], methods: Sequence[MethodSummary]) -> list[str]:
    notes = []
    for word, values in (
        ("model", {repr(run.header.get("model")) for run in runs}),
        ("data", {repr(run.header.get("data")) for run in runs}),
        ("number of steps", {repr(run.header.get("steps")) for run in runs}),
    ):
        if len(values) > 1:
            notes.append(
                f"These runs differ in {word} ({len(values)} of them): a difference between "
                "methods may come from there."
            )
    for method in methods:
        for run in method.runs:
            who = f"{method.label}, seed {run.seed if run.seed is not None else 'unknown'}"
            planned = run.header.get("steps")
            if not is_whole(run):
                fate = f"{who}: {run.status}, stopped at step {run.last_step} of {planned or '?'}"
                notes.append(f"{fate}; {_use(run, method)}.")
            elif finite(last_evaluation(run) or {}, "loss") is None:
                notes.append(f"{who}: the validation loss is not a finite number (diverged?).")
        for seed, count in Counter(run.seed for run in method.used).items():
            if count > 1 and seed is not None:
                notes.append(
                    f"{method.label}: seed {seed} was run {count} times; their mean counts."
                )
    return notes


def _use(run: Run, method: MethodSummary) -> str:
    last = last_evaluation(run)
    if last is None:
        return "no evaluation, not in the averages"
    if all(run is not used for used in method.used):
        return "not in the averages"
    return f"shown with its evaluation at step {last['step']}, in no comparison"


def _num_slots(run: Run) -> int | None:
    """Layers times experts: what a count of dead experts is out of."""
    model = run.header.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("layers"), list):
        return None
    experts = model.get("num_experts")
    return len(model["layers"]) * experts if isinstance(experts, int) else None


def _floor(run: Run) -> float | None:
    """MaxVio that perfect routing still shows by chance: √(2 ln E · E / (N·K)) for N tokens."""
    model, data = run.header.get("model"), run.header.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict):
        return None
    experts, top_k = finite(model, "num_experts"), finite(model, "top_k")
    # An evaluation may take a part of the validation set; then it says how many tokens it took.
    tokens = finite(last_evaluation(run) or {}, "tokens") or finite(data, "val_tokens")
    if experts is None or top_k is None or tokens is None:
        return None
    if experts < 2 or not tokens * top_k > 0:
        return None
    return math.sqrt(2 * math.log(experts) * experts / (tokens * top_k))
