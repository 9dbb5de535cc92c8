"""Rules about how hard a method pushes: not at all, too hard, or as hard as it may."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import numpy as np

from moebalance.report.columns import LEAST_LOSS
from moebalance.report.diagnosis.finding import Finding, Severity, Wish
from moebalance.report.diagnosis.reading import Reading, windows
from moebalance.report.estimates import finite, is_whole, last_evaluation

_SAME = 0.98
"""Correlation of the loads at first and at the end: training alone brings it well below that."""
_PINNED = 0.05
"""Soft MaxVio below which the mean of a router's scores is pinned at uniform."""
_END = 0.99
"""Part of a range at which a controller stands at its end."""


def never_acted(log: Reading) -> Iterator[Finding]:
    """A method is there, and does nothing."""
    part, selecting = log.charging, log.selecting
    if part is not None and part.number("strength") == 0 and selecting is None:
        yield Finding(
            Severity.ERROR,
            f"{part.word} has strength 0: it counts and charges nothing.",
            "Give it a strength, or say none.",
            rule="never-acted",
        )
        return
    spread = log.series("price_spread")[1:]  # the first step is finished before there is a price
    known = spread[np.isfinite(spread)]
    if selecting is not None and len(known) and float(np.ptp(known)) == 0:
        yield Finding(
            Severity.ERROR,
            f"The price of {selecting.word} never moves.",
            "Give it a speed above 0, and call balancing.step() once after each optimizer step.",
            f"price spread {known[0]:g} in all of {len(known)} steps",
            "never-acted",
        )
        return
    if not log.balances or len(log.snapshots) < 2 or not log.judged:
        return
    first_step = float(log.load_step[0])
    if first_step > 0.1 * log.run.last_step:
        return  # by then it may have done its work
    for layer in range(log.layers):
        first, last = log.loads(layer)[0], log.late_load(layer)
        still = first.std() > 0 and last.std() > 0 and np.corrcoef(first, last)[0, 1] > _SAME
        if not still or last.max() - 1 < 0.5 or abs(last.max() / first.max() - 1) > 0.1:
            return
    yield Finding(
        Severity.ERROR,
        "The loads are what they were in the first steps: neither training nor balancing moves "
        "the routers.",
        "Routers that are frozen (LoRA, requires_grad=False, a learning rate of 0) cannot answer a "
        "price in the loss: train them, or price the selection with loss-free.",
        f"correlation above {_SAME} between step {first_step:.0f} and the end in every layer",
        "never-acted",
    )


def costs_loss(log: Reading) -> Iterator[Finding]:
    """The task loss is higher than in the same run without balancing, beyond noise."""
    mine = finite(last_evaluation(log.run) or {}, "loss")
    if mine is None or not is_whole(log.run) or not log.balances:
        return
    losses = {run.seed: finite(last_evaluation(run) or {}, "loss") for run in log.twins}
    known = [loss for loss in losses.values() if loss is not None]
    if not known:
        return
    paired = losses.get(log.run.seed)
    base = statistics.fmean(known) if paired is None else paired
    # Twice the deviation of a difference of two runs; a pair shares its seed, and is no noisier.
    noise = 2 * math.sqrt(2) * statistics.stdev(known) if len(known) > 1 else 0.0
    if mine - base > max(LEAST_LOSS, noise):
        part = log.charging
        strength = part.number("strength") if part else None
        yield Finding(
            Severity.WARNING,
            "The balancing costs loss.",
            "Balanced runs are behind at first, and some catch up. If it stays so in a longer run: "
            + (
                f"lower the strength of {part.word} from {strength:g} to about {strength / 3:.2g}."
                if part and strength
                else "lower the speed, or use a method without a price in the loss."
            ),
            f"validation loss {mine:.3f}, without balancing {base:.3f}"
            + (" at the same seed" if paired is not None else "")
            + f"; noise of seeds up to {max(LEAST_LOSS, noise):.3f}",
            "costs-loss",
            wish=Wish.LESS,
        )


def pinned(log: Reading) -> Iterator[Finding]:
    """Scores are held at uniform so hard that experts do not specialise."""
    soft = log.evaluated("soft_maxvio")
    known = [mi for mi in log.evaluated("mi") if mi > 0]
    if not soft or len(known) < 2 or log.charging is None:
        return
    if soft[-1] < _PINNED and known[-1] < min(0.5 * max(known), 0.05):
        strength = log.charging.number("strength")
        yield Finding(
            Severity.WARNING,
            "The router's scores are pinned at uniform, and experts stop telling domains apart.",
            f"Lower the strength from {strength:g} to about {strength / 3:.2g}."
            if strength
            else "Lower the strength.",
            f"soft MaxVio {soft[-1]:.3f}; information between domain and expert "
            f"{max(known):.3f} at its highest, {known[-1]:.3f} at the end",
            "pinned",
            wish=Wish.LESS,
        )


def at_the_end(log: Reading) -> Iterator[Finding]:
    """`Targeted` stands at its ceiling, or has let go of every layer."""
    part = log.steered
    most, least = log.series("multiplier_most"), log.series("multiplier_least")
    if part is None or not log.judged or not np.isfinite(most).all():
        return
    ceiling = part.number("ceiling") or 30.0
    highest, lowest = float(windows(most, 10)[-1]), float(windows(least, 10)[-1])
    if highest >= _END * ceiling:
        all_of_them = lowest >= _END * ceiling
        yield Finding(
            Severity.WARNING,
            ("Every layer" if all_of_them else "At least one layer")
            + " is charged as much as its target allows: the goal is out of reach.",
            "Ask for less, start from a larger strength, or raise the ceiling; a goal for the hard "
            "load is reached soonest with load='hard'.",
            f"multiplier {highest:.3g} of at most {ceiling:g} over the last tenth of the run",
            "target-out-of-reach",
            wish=Wish.MORE,
        )
    elif highest == 0:
        yield Finding(
            Severity.OK,
            "Every layer meets its goal without any charge: the balancing costs nothing here.",
            because="multiplier 0 in every layer over the last tenth of the run",
            rule="target-met-alone",
        )
