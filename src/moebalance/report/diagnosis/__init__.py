"""A diagnosis in words: what is wrong with a run, from which numbers, and what to change.

A rule is a function of a `Reading` that gives findings, or none. Every threshold is a constant with
the reason for it; every rule is tested on runs that have its fault and nearly have it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

from moebalance.report.diagnosis import balance, course, movement, pressure
from moebalance.report.diagnosis.finding import Finding, Severity
from moebalance.report.diagnosis.reading import Reading
from moebalance.runlog import Run

__all__ = ["RULES", "Finding", "Severity", "examine", "render"]

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


def examine(runs: Sequence[Run]) -> list[tuple[Run, tuple[Finding, ...]]]:
    """Examine runs, each in the light of those beside it that differ in the method alone.

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


def render(run: Run, findings: Sequence[Finding], *, width: int = 100) -> str:
    """One run's paragraph in lines of at most `width` characters where words allow it."""
    seed = "" if run.seed is None else f", seed {run.seed}"
    lines = [f"{run.path.parent}: {run.method}, {run.batching}{seed}, {run.last_step} steps"]
    for finding in findings:
        lines += _wrapped(f"  {finding.severity:<8}  ", finding.what, width)
        lines += _wrapped(" " * 12, finding.because, width)
        if finding.do:
            lines += _wrapped(f"{'':12}→ ", finding.do, width)
    if not findings:
        lines.append("  ok        Nothing is found to be wrong.")
    return "\n".join(lines)


def _without_balancing(other: Run, run: Run) -> bool:
    """Whether `other` is `run` without balancing, but for the seed."""
    keys = ("name", "data", "model", "steps")
    return (
        other.method == "none"
        and other.batching == run.batching
        and all(other.header.get(key) == run.header.get(key) for key in keys)
        and bool(other.evals)
    )


def _wrapped(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
