"""Rules about how the load moves: in circles, by overshooting, or too late.

Oscillation. An average that follows the load with rate η, and a router that gives way at a speed κ
per unit of it, are two integrators in a loop:

    m' = η (p − m),    p' = −κ m    ⇒    ω² = η κ,    damping ζ = ½ √(η / κ).

A measured period P is ω = 2π / P, hence κ = ω² / η. Well damped, ζ = ½, is η = κ: so either

    η → ω² / η        or, since κ is in proportion to the strength,        α → α · (η / ω)².
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from moebalance.report.diagnosis.finding import Finding, Severity
from moebalance.report.diagnosis.oscillation import Swing, swing
from moebalance.report.diagnosis.reading import Array, Reading, windows

_SNAPSHOTS = 60
"""Fewest snapshots for a period: two turns of the shortest ones that snapshots show well."""
_SURE = 0.5
"""Autocorrelation half a period on (and 0.4 a period on), over two periods at least: walks of few
directions come that far once in a hundred layers (tests), and in a fifth of them without."""
_LARGE, _FADING = 0.3, 0.15
"""Swing in even shares, and autocorrelation a period on, where the memory is known not to damp it:
while the learning rate falls a large swing fades from one turn to the next."""
_HIGHEST = 0.7
"""Largest rate to advise: above it there is next to no memory, and another method is meant."""
_TURNS = -0.3
"""Autocorrelation from one step to the next below which a load jumps to and fro."""
_RUNNING = 0.6
"""Part of the way at full speed, u a step and expert, that the spread of prices has come."""


def oscillation(log: Reading) -> Iterator[Finding]:
    """A layer's load swings, and comes back."""
    every = _spacing(log)
    if every is None:
        return
    for layer in range(log.layers):
        loads = _late(log.loads(layer))
        found = swing((loads / loads.shape[1]).tolist())
        period = every * found.period
        damping = _damping(log, period) if period else None
        # A swing whose memory is sure not to damp it need not be as regular to be one.
        loose = damping is not None and damping < 0.25 and found.amplitude > _LARGE
        turns = found.trough < -_SURE and found.rebound > (_FADING if loose else _SURE - 0.1)
        if not turns or found.amplitude < 0.1 or 2 * found.period > len(loads):
            continue
        if damping is not None and damping >= 0.5:
            continue  # it fades by itself
        what, do = _advice(log, period)
        yield Finding(
            Severity.WARNING,
            f"{log.names[layer]} oscillates with period {period} steps: {what}.",
            do,
            _numbers(found),
            "oscillation",
            (layer,),
        )


def overshoot(log: Reading) -> Iterator[Finding]:
    """A selection price that goes too far at every step, so that the load jumps to and fro."""
    part = log.selecting
    if part is None or _spacing(log) != 1:
        return
    for layer in range(log.layers):
        loads = _late(log.loads(layer))
        moves = loads - loads.mean(axis=0)
        size = float(np.sqrt(np.mean(moves**2)))
        turns = float(np.mean(moves[1:] * moves[:-1])) / size**2 if size > 0 else 0.0
        if turns < _TURNS and size > 0.2:
            speed = part.number("speed")
            other = ", or use rule='proportional'" if part.settings.get("rule") == "sign" else ""
            yield Finding(
                Severity.WARNING,
                f"{log.names[layer]} jumps to and fro: the price of {part.word} overshoots.",
                f"Lower the speed from {speed:g} to about {speed / 10:.2g}{other}."
                if speed
                else "Use loss-free, whose speed can be lowered.",
                f"load off its mean by {size:.2f} even shares, autocorrelation {turns:.2f} from "
                "one step to the next",
                "overshoot",
                (layer,),
            )


def price_too_slow(log: Reading) -> Iterator[Finding]:
    """A sign rule that has gone the same way at every step, and is not there yet."""
    part = log.selecting
    speed = part.number("speed") if part else None
    spread = log.series("price_spread")
    if part is None or not speed or part.settings.get("rule") != "sign" or not log.judged:
        return
    maxvio = log.late_maxvio()
    if not np.isfinite(spread[-1]) or not maxvio or max(maxvio) < 0.5:
        return
    # The busiest and the idlest expert part by 2u a step at most.
    way = float(spread[-1]) / (2 * speed * log.run.last_step)
    if way > _RUNNING:
        yield Finding(
            Severity.WARNING,
            "The selection price still runs at full speed, which is too small.",
            f"Raise the speed of {part.word} from {speed:g} to about {10 * speed:.2g}.",
            f"price spread {spread[-1]:.3g}, {100 * way:.0f} % of what {log.run.last_step} steps "
            f"of {speed:g} can make; MaxVio {max(maxvio):.2f}",
            "price-too-slow",
        )


def slow_recovery(log: Reading) -> Iterator[Finding]:
    """After a change of text the balance stays away for a long time."""
    maxvio = log.series("maxvio")
    if log.run.batching != "shift" or not log.judged or not np.isfinite(maxvio).all():
        return
    half = len(maxvio) // 2
    course = windows(maxvio[half:], 10)
    before = float(maxvio[half - max(10, half // 4) : half].mean())
    peak = int(np.argmax(course[:5]))
    if course[peak] < max(1.5 * before, before + 0.3):
        return  # the change hardly showed
    back = [i for i in range(peak, 10) if course[i] <= 1.25 * before]
    part = log.charging
    rate = part.rate(log.tokens) if part else None
    # A memory that is over within a twentieth of the time after the change is not what delays it.
    if (back and back[0] <= 5) or rate is None or 1 / rate < half / 20:
        return
    when = f"back after {(back[0] + 1) * half // 10} steps" if back else "never back"
    yield Finding(
        Severity.WARNING,
        "The balance is slow to return after the change of text: the memory is too long.",
        f"Raise the rate from {rate:.2g} to about {min(_HIGHEST, 20 / half):.2g}, shorten "
        "memory_tokens, or let it adapt with rate='auto'.",
        f"MaxVio {before:.2f} before, {course[peak]:.2f} at its peak, {when} of {half}; the memory "
        f"is of {1 / rate:.0f} steps",
        "slow-recovery",
    )


def _damping(log: Reading, period: int) -> float | None:
    """ζ = η / 2ω of the loop, by the rate of the memory; None for a method without one."""
    part = log.charging
    rate = part.rate(log.tokens) if part else None
    return None if rate is None else rate * period / (4 * math.pi)


def _advice(log: Reading, period: int) -> tuple[str, str]:
    part = log.charging
    strength = part.number("strength") if part else None
    rate = part.rate(log.tokens) if part else None
    if part is None or not strength or not rate:
        selecting = log.selecting
        if selecting is not None and (u := selecting.number("speed")):
            return (
                f"the speed {u:g} of {selecting.word} is too large",
                f"Lower it to about {u / 3:.2g}.",
            )
        return "the price answers too late", "Lower the strength, or shorten the memory."
    speed = 2 * math.pi / period
    needed = speed**2 / rate
    lower = strength * min(1.0, (rate / speed) ** 2)
    name, now = "rate", f"{rate:g}"
    raised = f"{needed:.2g}"
    if part.number("memory_tokens") is not None:
        name, now = "memory", f"{part.number('memory_tokens'):g} tokens"
        raised = f"{-log.tokens / math.log1p(-min(needed, _HIGHEST)):.2g} tokens"
    side = "small" if name == "rate" else "long"
    what = f"the {name} of {now} is too {side} for strength {strength:g}"
    if needed > _HIGHEST:
        return what, f"Lower the strength to about {lower:.1g}; no {name} alone would do."
    verb = "Raise the rate" if name == "rate" else "Shorten the memory"
    return what, f"{verb} to about {raised}, or lower the strength to about {lower:.1g}."


def _numbers(found: Swing) -> str:
    return (
        f"loads swing by {found.amplitude:.2f} even shares; autocorrelation {found.trough:.2f} "
        f"half a period on, {found.rebound:.2f} a period on"
    )


def _late(loads: Array) -> Array:
    """Without the first third: at first every load moves, and at last learning rates are near 0."""
    return loads[len(loads) // 3 :]


def _spacing(log: Reading) -> int | None:
    """Steps between snapshots, where they are even and enough to see a period; else None."""
    steps = log.load_step
    if len(steps) < _SNAPSHOTS:
        return None
    gaps = np.diff(steps)
    every = int(np.median(gaps))
    # One odd gap at the end belongs to the last step, which is always kept.
    return every if (gaps[:-1] == every).all() else None
