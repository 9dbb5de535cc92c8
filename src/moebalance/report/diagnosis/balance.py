"""Rules about the balance that was reached: how even, where not, and which way it goes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import numpy as np

from moebalance.report.diagnosis.finding import Finding, Severity, Wish
from moebalance.report.diagnosis.reading import Reading, spread, windows

UNEVEN = 1.0
"""MaxVio above which a layer is called uneven: its busiest expert has twice its share."""
_DEAD = 0.01
"""Share of an even load below which an expert is dead, as in `metrics.dead_fraction`."""
_EARLY = 0.25
"""Part of a run that counts as early: learning rates are at their highest then."""
_EXPECTED = 30
"""Assignments that an even expert must have before an empty one means something: e⁻³⁰ by chance."""
_FLOOR = 1.3
"""Times the sampling floor: MaxVio of even routing stays below 1.3 of that figure from above."""
_THIRDS = 3
"""How often a run may fall again as it did in its last third, to be on its way: as long again."""
_APART = 3.0
"""How many times worse than the other layers one must be: neighbours differ by two and more."""
_WORSE = 1.3
"""How much MaxVio must rise over the second half to be a drift, apart from its noise."""


def at_the_floor(log: Reading) -> Iterator[Finding]:
    """Nothing left but chance: the batches are as even as batches of that size can be."""
    maxvio, floor = log.series("maxvio"), log.floor(log.tokens)
    if not log.judged or not np.isfinite(maxvio).any() or math.isnan(floor):
        return
    late = float(windows(maxvio, 5)[-1])
    if late <= _FLOOR * floor:
        yield Finding(
            Severity.OK,
            "The load is as even as batches of this size can show: there is nothing to do.",
            because=f"MaxVio {late:.2f} over the last fifth; chance alone gives about {floor:.2f} "
            f"at {log.tokens:.0f} tokens a step",
            rule="at-the-floor",
        )


def dead(log: Reading) -> Iterator[Finding]:
    """Experts that are hardly ever chosen, and since when."""
    for layer in range(log.layers):
        load = log.late_load(layer)
        tokens = log.late_tokens
        if not tokens * log.top_k / len(load) >= _EXPECTED:  # or not known
            continue
        idle: list[int] = np.flatnonzero(load < _DEAD).tolist()
        if not idle:
            continue
        since = _since(log, layer, idle)
        early = since is not None and since <= _EARLY * _planned(log)
        when = "" if since is None else f" since step {since}, {'early' if early else 'late'}"
        if len(idle) > 1 and since is not None:
            when = f"; half of them{when}"
        yield Finding(
            Severity.WARNING,
            f"{log.names[layer]} has {_experts(idle)} dead{when}.",
            _revive(log, since, early=early),
            f"{len(idle)} of {len(load)} experts below a hundredth of an even share over the last "
            f"{tokens:,.0f} tokens counted",
            "dead",
            (layer,),
            Wish.MORE,
        )


def one_layer(log: Reading) -> Iterator[Finding]:
    """One layer that is far less even than the others."""
    maxvio = log.late_maxvio()
    if len(maxvio) < 2:
        return
    worst = int(np.argmax(maxvio))
    others = float(np.median([v for i, v in enumerate(maxvio) if i != worst]))
    floor = log.floor(log.late_tokens)
    if maxvio[worst] > max(0.5, _APART * others, 0 if math.isnan(floor) else 3 * floor):
        look = "Look at what this layer reads: its router may see little but one feature."
        steer = "One strength does not fit all layers: target=… finds one for each."
        yield Finding(
            Severity.WARNING,
            f"{log.names[worst]} is far less even than the others.",
            steer if log.charging and not log.steered else look,
            f"MaxVio {maxvio[worst]:.2f}, median of the others {others:.2f}",
            "one-layer",
            (worst,),
        )


def uneven(log: Reading) -> Iterator[Finding]:
    """MaxVio is high, and is not coming down."""
    maxvio = log.late_maxvio()
    if not maxvio or not log.judged or soft_without_hard(log):
        return
    high = tuple(i for i, value in enumerate(maxvio) if value > UNEVEN)
    floor = log.floor(log.late_tokens)
    if not high or max(maxvio) < (0 if math.isnan(floor) else 2 * floor):
        return
    _, middle, last = windows(log.series("maxvio"), 3)
    falling = bool(last - UNEVEN <= _THIRDS * (middle - last))
    where = _layers(log, high)
    numbers = (
        f"MaxVio {', '.join(f'{maxvio[i]:.2f}' for i in high)} at the end; in batches {middle:.2f} "
        f"over the second third, {last:.2f} over the last"
    )
    if log.balances is False:
        severity, state = Severity.WARNING, "is uneven, and nothing balances it"
        do = "Attach a method: phi+loss-free keeps both soft and hard load even."
    elif falling:
        severity, state = Severity.NOTE, "is uneven still, but on its way"
        do = "Train on, or raise the strength if it should come sooner."
    else:
        severity, state = Severity.WARNING, "is uneven and stays so: the balancing is too weak"
        do = _stronger(log) if log.balances else ""
    what = f"{where}: the load {state}."
    yield Finding(severity, what, do, numbers, "uneven", high, Wish.MORE)


def soft_hard_gap(log: Reading) -> Iterator[Finding]:
    """The scores are even on average, the choices made from them are not."""
    if not soft_without_hard(log):
        return
    soft, hard = log.late_maxvio("soft"), log.late_maxvio()
    yield Finding(
        Severity.WARNING if max(hard) > UNEVEN else Severity.NOTE,
        "The router's scores are even, the experts it chooses are not.",
        "A larger strength does not reach this. Charge what is realised, load='hard', or let "
        "a selection price take the rest: phi+loss-free.",
        f"MaxVio {np.mean(soft):.2f} of the soft load, {np.mean(hard):.2f} of the hard one, means "
        "over layers",
        "soft-hard-gap",
        wish=Wish.OTHER,
    )


def drift(log: Reading) -> Iterator[Finding]:
    """The balance had been better, and gets worse toward the end."""
    maxvio = log.series("maxvio")
    if not log.judged or log.run.batching == "shift" or not np.isfinite(maxvio).all():
        return
    course = windows(maxvio, 10)
    best, last = float(course[3:].min()), float(course[-1])
    noise = spread(maxvio) / math.sqrt(len(maxvio) / 10)
    rising = bool(course[-1] > course[-3] > best or course[-1] > course[-2] > best)
    if rising and last > _WORSE * best and last - best > max(0.2, 5 * noise):
        yield Finding(
            Severity.WARNING,
            "The balance gets worse toward the end.",
            "The router has outgrown the price: do not relax the strength so early or so far, or "
            "hold the balance with target=….",
            f"MaxVio of batches {best:.2f} at its best, {last:.2f} over the last tenth of the run",
            "drift",
            wish=Wish.MORE,
        )


def soft_without_hard(log: Reading) -> bool:
    """Whether the soft load is even while the hard one is not, under a price of the soft load."""
    soft, hard = log.late_maxvio("soft"), log.late_maxvio()
    part = log.charging
    if not soft or part is None or part.settings.get("load") != "soft" or log.selecting:
        return False
    # The hard load of an even router may well lie at twice its soft one: three times is a gap.
    evenness = statistics.fmean(soft)
    return evenness < 0.3 and statistics.fmean(hard) > max(0.5, 3 * evenness)


def _planned(log: Reading) -> int:
    planned = log.run.header.get("steps")
    return max(log.run.last_step, planned if isinstance(planned, int) else 0)


def _since(log: Reading, layer: int, idle: list[int]) -> int | None:
    """The step from which on half of these experts were idle; None where snapshots cannot say."""
    if len(log.snapshots) < 4:
        return None
    loads = log.loads(layer)[:, idle]
    # Mean load from each snapshot to the last: a stray token late does not revive an expert.
    later = loads[::-1].cumsum(axis=0)[::-1] / np.arange(len(loads), 0, -1)[:, None]
    dead = (later < _DEAD) & (loads < _DEAD)
    steps = [log.load_step[int(np.argmax(d))] for d in dead.T if d.any()]
    return int(np.median(steps)) if 2 * len(steps) > len(idle) else None


def _revive(log: Reading, since: int | None, *, early: bool) -> str:
    if log.balances is False:
        return "Attach a method: without one, an expert that is not chosen learns nothing."
    if since is None:
        return "Raise the strength, or add loss-free."
    if early:
        return (
            "They died before the balancing took hold: lengthen the warm-up of the learning rate, "
            "start at full strength, or add loss-free, which acts from the first step."
        )
    return "They died under the balancing: raise the strength, or add loss-free."


def _stronger(log: Reading) -> str:
    part, selecting = log.charging, log.selecting
    if part is not None and (strength := part.number("strength")):
        return (
            f"Raise the strength of {part.word} from {strength:g} to about {3 * strength:.2g}, or "
            "set the balance you want with target=…."
        )
    if selecting is not None and (speed := selecting.number("speed")):
        return f"Raise the speed of {selecting.word} from {speed:g} to about {3 * speed:.2g}."
    return "Use a method whose price is charged or subtracted, such as phi+loss-free."


def _layers(log: Reading, layers: tuple[int, ...]) -> str:
    if len(layers) == log.layers > 1:
        return "All layers"
    names = [log.names[i] for i in layers]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return shown[:1].upper() + shown[1:]


def _experts(idle: list[int]) -> str:
    shown = ", ".join(str(int(i)) for i in idle[:6]) + (", …" if len(idle) > 6 else "")
    return f"expert {shown}" if len(idle) == 1 else f"{len(idle)} experts ({shown})"
