"""A diagnosis in words: what is wrong with runs, from which numbers, and the one thing to change.

A rule is a function of a `Reading` that gives findings, or none. Every threshold is a constant with
the reason for it; every rule is tested on runs that have its fault and nearly have it.

    finding.py       what a rule says
    reading.py       a run log as the rules read it
    course.py        rules about the run: whole, long enough, does its loss behave
    balance.py       rules about the balance that was reached
    pressure.py      rules about how hard a method pushes
    oscillation.py   does a load swing
    movement.py      rules about how the load moves
    advice.py        the findings of a method's runs become one recommendation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from moebalance.report.diagnosis import balance, course, movement, pressure
from moebalance.report.diagnosis.advice import Diagnosis, Evidence, counted, reconcile, render
from moebalance.report.diagnosis.finding import Finding, Severity, Wish
from moebalance.report.diagnosis.reading import Reading
from moebalance.report.estimates import MethodSummary, method_summaries
from moebalance.runlog import Run

__all__ = [
    "RULES",
    "Diagnosis",
    "Evidence",
    "Finding",
    "Severity",
    "Wish",
    "counted",
    "diagnose",
    "examine",
    "judge",
    "render",
]

RULES: tuple[Callable[[Reading], Iterator[Finding]], ...] = (
    course.unfinished,
    course.too_short,
    course.not_finite,
    course.diverged,
    course.spikes,
    pressure.never_acted,
    balance.dead,
    balance.uneven,
    balance.soft_hard_gap,
    balance.one_layer,
    balance.drift,
    movement.oscillation,
    movement.overshoot,
    movement.price_too_slow,
    movement.slow_recovery,
    pressure.costs_loss,
    pressure.pinned,
    pressure.at_the_end,
    balance.at_the_floor,
)


def diagnose(runs: Sequence[Run]) -> tuple[Diagnosis, ...]:
    """Judge runs of any kind: one diagnosis for each batching mode, method and setting."""
    modes = dict.fromkeys(run.batching for run in runs)
    alike = ([run for run in runs if run.batching == mode] for mode in modes)
    return tuple(found for some in alike for found in judge(method_summaries(some, (), runs)))


def judge(methods: Sequence[MethodSummary]) -> tuple[Diagnosis, ...]:
    """Judge the methods of one batching mode, each in the light of the others."""
    examined = iter(examine([run for method in methods for run in method.runs]))
    return tuple(reconcile(method, [next(examined) for _ in method.runs]) for method in methods)


def examine(runs: Sequence[Run]) -> list[tuple[Run, tuple[Finding, ...]]]:
    """Examine runs, each with the runs that differ from it in the method alone.

    Returns:
        A pair for each run: itself and its findings, the worst first.
    """
    found = []
    for run in runs:
        twins = tuple(other for other in runs if _without_balancing(other, run))
        reading = Reading(run, twins)
        findings = [finding for rule in RULES for finding in rule(reading)]
        found.append((run, tuple(sorted(findings, key=lambda f: f.severity.rank))))
    return found


def _without_balancing(other: Run, run: Run) -> bool:
    """Whether `other` is `run` without balancing, but for the seed."""
    keys = ("name", "data", "model", "steps")
    return (
        other.method == "none"
        and other.batching == run.batching
        and all(other.header.get(key) == run.header.get(key) for key in keys)
        and bool(other.evals)
    )
