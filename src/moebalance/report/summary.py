"""What a set of runs shows, as plain values: sections, rows, verdicts and the notes under them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebalance.report.estimates import MethodSummary, finite, is_whole, method_summaries
from moebalance.report.verdict import verdict
from moebalance.runlog import Run


@dataclass(frozen=True)
class Metric:
    """One column: its key in the log, its title, its decimals and what it means in words."""

    key: str
    title: str
    digits: int
    meaning: str


METRICS = (
    Metric(
        "loss",
        "Validation loss",
        3,
        "Mean cross-entropy on held-out text, in nats per token. Lower is better. Differences of "
        "the size of the ± are noise.",
    ),
    Metric(
        "maxvio",
        "MaxVio global",
        2,
        "How far the busiest expert lies above an even share, over the whole evaluation set: "
        "largest load / mean load − 1, averaged over layers. 0 is perfect; 1 means that one "
        "expert gets twice its share; above about 1, experts are wasted and parallel ones wait.",
    ),
    Metric(
        "maxvio_batch",
        "MaxVio batch",
        2,
        "The same within single batches. Always larger than the global one, because a batch is a "
        "sample; this is what expert parallelism feels at each step.",
    ),
    Metric(
        "soft_maxvio",
        "Soft MaxVio",
        2,
        "MaxVio of the router's probabilities before top-k. Methods that charge the loss steer "
        "this number directly.",
    ),
    Metric(
        "soft_hard_gap",
        "Soft–hard gap",
        3,
        "How far the load that top-k delivers lies from the load that the probabilities promise: "
        "the share of load that would have to move (total variation distance). Small is good; a "
        "large gap beside a small soft MaxVio means that probabilities are balanced, not work.",
    ),
    Metric(
        "gini",
        "Gini",
        3,
        "Inequality of load over the experts: 0 when all are equal, near 1 when one does all. "
        "Below 0.1 is even; above 0.4 a few experts carry the layer.",
    ),
    Metric(
        "entropy",
        "Entropy",
        3,
        "Entropy of the load divided by its largest value: 1 is uniform. It is forgiving: 0.95 "
        "can hide several dead experts.",
    ),
    Metric(
        "dead_experts",
        "Dead experts",
        1,
        "Experts, over all layers, that got less than 1 % of an even share. 0 is good; each one is "
        "memory that learns next to nothing.",
    ),
    Metric(
        "mi",
        "Domain MI",
        3,
        "Mutual information between a token's domain and its expert, in nats: how much experts "
        "specialise. 0 means that every expert sees the same mix. Balance bought with MI near 0 "
        "may have cost specialisation.",
    ),
    Metric(
        "purity",
        "Purity",
        3,
        "The share of an expert's tokens that come from its main domain, averaged over experts by "
        "load. The largest domain's share of the text means no specialisation, 1 means that every "
        "expert serves one domain only.",
    ),
)
_BATCHINGS = {
    "mixed": ("Mixed micro-batches", "Every micro-batch draws from all domains."),
    "one-domain": (
        "One-domain micro-batches",
        "Every micro-batch comes from a single domain, so balance within it is not what matters.",
    ),
}


@dataclass(frozen=True)
class Section:
    """One batching mode: its methods in page order, its verdict, and what to know beside it."""

    batching: str
    title: str
    about: str
    methods: tuple[MethodSummary, ...]
    verdict: str
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
    return tuple(_section(mode, [run for run in runs if run.batching == mode]) for mode in order)


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
                "seeds": len(method.used),
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


def _section(batching: str, runs: Sequence[Run]) -> Section:
    methods = tuple(method_summaries(runs, [metric.key for metric in METRICS]))
    title, about = _BATCHINGS.get(batching, (f"{batching} micro-batches", ""))
    slots = {_num_slots(run) for run in runs}
    floors = {_floor(run) for method in methods for run in method.used}
    return Section(
        batching=batching,
        title=title,
        about=about,
        methods=methods,
        verdict=verdict(methods),
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
                f"These runs differ in {word} ({len(values)} kinds): a difference between methods "
                "may come from there."
            )
    for method in methods:
        for run in method.runs:
            who = f"{method.label}, seed {run.seed if run.seed is not None else 'unknown'}"
            planned = run.header.get("steps")
            if not is_whole(run):
                fate = f"{who}: {run.status}, stopped at step {run.last_step} of {planned or '?'}"
                notes.append(f"{fate}; {_use(run, method)}.")
            elif finite(run.evals[-1], "loss") is None:
                notes.append(f"{who}: the validation loss is not a finite number (diverged?).")
        for seed, count in Counter(run.seed for run in method.used).items():
            if count > 1 and seed is not None:
                notes.append(f"{method.label}: seed {seed} was run {count} times, counted once.")
    return notes


def _use(run: Run, method: MethodSummary) -> str:
    if all(run is not used for used in method.used):
        return "not in the averages" if run.evals else "no evaluation, not in the averages"
    return f"shown with its evaluation at step {run.evals[-1]['step']}, in no comparison"


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
    tokens = (finite(run.evals[-1], "tokens") if run.evals else None) or finite(data, "val_tokens")
    if not experts or not top_k or not tokens or experts < 2:
        return None
    return math.sqrt(2 * math.log(experts) * experts / (tokens * top_k))
