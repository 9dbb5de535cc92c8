"""Rules about the run itself: is it whole, is it long enough, does its loss behave?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moebalance.report.diagnosis.finding import Finding, Severity
from moebalance.report.diagnosis.reading import LEAST_STEPS, Reading, spread, windows

_JUMP = 10.0
"""Deviations by which a spike stands out: a normal loss does that once in 10²³ steps."""
_SPIKE = 0.1
"""Nats that a spike has at least: a smaller one hurts nobody, however quiet the loss is."""
_RISE = 0.15
"""Of what the loss had fallen by: a tenth or so comes and goes with the text."""


def unfinished(log: Reading) -> Iterator[Finding]:
    """The run failed, was interrupted, or has no end row."""
    run = log.run
    planned = run.header.get("steps")
    where = f"status: {run.status}; last step {run.last_step} of {planned or 'an unknown number'}"
    if run.status == "failed":
        error = str((run.end or {}).get("error") or "no reason logged")
        because = f"{error}; {where}"
        yield Finding(Severity.ERROR, "The run failed.", "Mend that first.", because, "unfinished")
    elif run.truncated or run.status in ("no end row", "interrupted"):
        yield Finding(
            Severity.NOTE,
            "The run is not whole: it is still going, or was stopped.",
            "If it was stopped, go on with --resume. What follows is about the part there is.",
            where + ("; the last line was cut off" if run.truncated else ""),
            "unfinished",
        )


def too_short(log: Reading) -> Iterator[Finding]:
    """Too few steps, or no rows about them."""
    last, rows = log.run.last_step, len(log.step)
    if log.run.header.get("trace"):
        yield Finding(
            Severity.NOTE,
            "This is a trace: its load is judged, and not the course of a training.",
            "For the course, log a run with moebalance.monitor(model, log=…).",
            f"{last} step{'' if last == 1 else 's'} of {log.run.header['trace']}",
            "trace",
        )
    elif last < LEAST_STEPS:
        yield Finding(
            Severity.NOTE,
            "The run is too short to judge how its balance goes.",
            "Train longer, then ask again.",
            f"{last} steps of at least {LEAST_STEPS}",
            "too-short",
        )
    elif rows < LEAST_STEPS:
        yield Finding(
            Severity.NOTE,
            "The log has hardly any step rows: only its end is judged.",
            "Ask about the original log, not an archived one.",
            f"{rows} rows about {last} steps",
            "few-rows",
        )


def not_finite(log: Reading) -> Iterator[Finding]:
    """A loss that is NaN or infinite."""
    logged = [(row["step"], row["loss"]) for row in log.run.steps if "loss" in row]
    lost = [step for step, loss in logged if loss is None]
    if lost:
        yield Finding(
            Severity.ERROR,
            f"The loss is not a finite number from step {lost[0]} on."
            if len(lost) > 1
            else f"The loss is not a finite number at step {lost[0]}.",
            "Lower the learning rate or lengthen its warm-up, clip gradients, and keep routers "
            "and balancing in float32.",
            f"{len(lost)} of {len(logged)} step rows",
            "not-finite",
        )


def diverged(log: Reading) -> Iterator[Finding]:
    """A loss that has risen again, and stays up."""
    loss = log.series("loss")
    if not log.judged or log.run.batching == "shift" or not np.isfinite(loss).all():
        return  # another text may well have another loss
    course = windows(loss, 10)
    lowest, last = float(course.min()), float(course[-1])
    noise = spread(loss) / np.sqrt(len(loss) / 10)
    fallen = float(course[0]) - lowest
    risen = last - lowest
    # Five errors of a window's mean, since the lowest of ten windows is low by chance as well.
    if risen > max(5 * noise, _RISE * fallen, _SPIKE):
        at = int(log.step[min(len(loss) - 1, (int(course.argmin()) + 1) * len(loss) // 10)])
        yield Finding(
            Severity.ERROR,
            f"The loss has been rising since step {at} or so.",
            "Lower the learning rate, clip gradients; if the same run without balancing does not "
            "rise, lower the strength.",
            f"mean {lowest:.3f} at its lowest, {last:.3f} over the last tenth of the run; it had "
            f"fallen by {fallen:.3f}",
            "diverged",
        )


def spikes(log: Reading) -> Iterator[Finding]:
    """Single steps whose loss stands far out."""
    loss = log.series("loss")
    if not log.judged or not np.isfinite(loss).all():
        return
    half = 10
    start = max(half, len(loss) // 10)  # at first the loss falls too fast to speak of spikes
    noise = max(spread(loss[start:]), 1e-12)
    found = [
        i
        for i in range(start, len(loss))
        if loss[i] - np.median(loss[max(0, i - half) : i + half + 1]) > max(_JUMP * noise, _SPIKE)
    ]
    if found:
        worst = max(found, key=lambda i: loss[i])
        yield Finding(
            Severity.WARNING,
            f"The loss spikes: at step {int(log.step[worst])}"
            + (f" and in {len(found) - 1} more." if len(found) > 1 else "."),
            "Look at the text of that step; clip gradients or lower the learning rate.",
            f"{loss[worst]:.2f} there, against a usual change of {noise:.3f} from step to step",
            "spikes",
        )
