"""The sentence on top: what balancing changed, and how sure these runs can be.

Methods are compared by *paired* differences: seed by seed, with the same data order and the same
initial weights, so that what the seeds share cancels. A difference counts as real if Student's
95 % interval of its mean, d̄ ± t(n−1)·s/√n, leaves zero outside.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from moebalance.report.estimates import MethodSummary, number
from moebalance.report.methods import leader

_WORDS = {"maxvio": ("MaxVio", 2), "loss": ("validation loss", 3)}


@dataclass(frozen=True)
class Difference:
    """A mean difference over ``n`` shared seeds, with half its 95 % interval (None if n < 2)."""

    mean: float
    half: float | None
    n: int

    @property
    def sign(self) -> int | None:
        """−1 lower, 1 higher, 0 within noise, None where noise is unknown."""
        if self.half is None:
            return None
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Difference | None:
    """The mean of ours − theirs over the seeds both have; None where they share none.

    >>> paired({0: 1.0, 1: 1.2}, {0: 2.0, 1: 2.4, 2: 9.0})
    Difference(mean=-1.1, half=1.270620473617, n=2)
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    n = len(differences)
    if not n:
        return None
    half = None
    if n > 1:
        error = statistics.stdev(differences) / math.sqrt(n)
        half = round(float(stdtrit(n - 1, 0.975)) * error, 12)
    return Difference(round(statistics.fmean(differences), 12), half, n)


def verdict(methods: Sequence[MethodSummary]) -> str:
    """One sentence on one batching mode.

    Methods without a whole run take no part. The recommended method leads if it was run, else
    φ-balancing. If the leader was run with several settings, the one with the lowest validation
    loss speaks for it, and the sentence says so.
    """
    known = [m for m in methods if not m.partial and m.estimates]
    lead = leader(m.method for m in known)
    settings = [m for m in known if m.method == lead]
    baseline = next((m for m in known if m.method == "none"), None)
    if not known:
        return "No run reached its last evaluation, so there is nothing to compare yet."
    if not settings:
        return _without_phi(known, baseline)
    hero = min(settings, key=lambda m: _mean(m, "loss"))
    name = hero.label
    if len(settings) > 1:
        name += f" (the best by validation loss of {len(settings)} settings)"
    rivals = [m for m in known if m.balances is not False and m.method not in ("none", lead)]
    parts = [
        _against_baseline(name, hero, baseline) if baseline else _alone(name, hero),
        _against_rivals(hero, rivals),
        _best_balance(hero, [m for m in (*settings, *rivals) if m is not hero]),
    ]
    return "; ".join(part for part in parts if part) + "."


def _against_baseline(name: str, hero: MethodSummary, baseline: MethodSummary) -> str:
    balance, loss = _difference("maxvio", hero, baseline), _difference("loss", hero, baseline)
    known = [d for d in (balance, loss) if d is not None]
    tail = _seeds(max(known, key=lambda d: d.n, default=None))
    if all(d.sign is None for d in known):
        shared = [
            metric for metric in _WORDS if metric in hero.estimates.keys() & baseline.estimates
        ]
        if not shared:
            return f"{name} and no balancing have no measured number in common"
        parts = [f"{_named(hero, metric)} against {_text(baseline, metric)}" for metric in shared]
        return f"{name} shows {' and '.join(parts)} without balancing; {tail}"
    first, second = _balance_words(hero, baseline, balance), _loss_words(loss)
    signs = balance.sign if balance else None, loss.sign if loss else None
    joint = ", but" if signs in {(-1, 1), (0, -1), (1, -1)} else " and"
    return f"{name} {first}{joint} {second} {tail}"


def _balance_words(
    hero: MethodSummary, baseline: MethodSummary, difference: Difference | None
) -> str:
    if difference is None:
        return "has no MaxVio to compare"
    after, before = _text(hero, "maxvio"), _text(baseline, "maxvio")
    if difference.sign is None:
        return f"shows MaxVio {after} against {before} with no balancing (noise unknown)"
    if difference.sign == 0:
        return f"left MaxVio within seed noise ({after} against {before} with no balancing)"
    verb = "cut" if difference.sign < 0 else "raised"
    return f"{verb} MaxVio from {before} (no balancing) to {after}"


def _loss_words(difference: Difference | None) -> str:
    if difference is None:
        return "has no validation loss to compare"
    digits = _loss_digits(difference)
    size = f"{number(abs(difference.mean), digits)} nats/token"
    verb = "lowered" if difference.mean < 0 else "raised"
    if difference.sign is None or difference.half is None:
        return f"{verb} validation loss by {size} (noise unknown)"
    # Quoted in the direction of the change, so that "lowered by 0.03" reads 0.02 to 0.04.
    flip = difference.sign or 1
    low, high = sorted(
        flip * end for end in (difference.mean - difference.half, difference.mean + difference.half)
    )
    interval = f"95 % interval {number(low, digits)} to {number(high, digits)}"
    if difference.sign == 0:
        change = number(difference.mean, digits)
        return f"its validation loss stayed within seed noise (change {change}, {interval})"
    return f"{verb} validation loss by {size} ({interval})"


def _alone(name: str, hero: MethodSummary) -> str:
    parts = [_named(hero, metric) for metric in _WORDS if metric in hero.estimates]
    seeds = max(estimate.n for estimate in hero.estimates.values())
    noise = " (one seed: the noise between seeds is unknown)" if seeds == 1 else ""
    return (
        f"{name} reached {' and '.join(parts) or 'no measured number'}{noise}; no run without "
        "balancing is here, so what balancing itself gains cannot be said"
    )


def _without_phi(known: Sequence[MethodSummary], baseline: MethodSummary | None) -> str:
    parts = ["φ-balancing is not among these runs"]
    balanced = [m for m in known if "maxvio" in m.estimates and m is not baseline]
    if balanced:
        best = min(balanced, key=lambda m: _mean(m, "maxvio"))
        against = ""
        if baseline and "maxvio" in baseline.estimates:
            against = f" against {_text(baseline, 'maxvio')} with no balancing"
        lead = _lead("maxvio", best, balanced)
        parts.append(f"{lead}, {_text(best, 'maxvio')}{against}" if lead else "")
    losses = [m for m in known if "loss" in m.estimates]
    if len(losses) > 1:
        best = min(losses, key=lambda m: _mean(m, "loss"))
        lead = _lead("loss", best, losses)
        parts.append(f"{lead}, {_text(best, 'loss')}" if lead else "")
        parts.append(_against_rivals(best, [m for m in losses if m is not best], kind="method"))
    return "; ".join(part for part in parts if part) + "."


def _lead(metric: str, best: MethodSummary, among: Sequence[MethodSummary]) -> str:
    """Who has the lowest: alone only if it is below every other one beyond the noise of seeds."""
    word = _WORDS[metric][0]
    signs = [(m, d.sign) for m in among if m is not best if (d := _difference(metric, best, m))]
    if len(among) == 1:
        return f"{best.label} has {word}"
    if any(sign is None for _, sign in signs) or not signs:
        return ""
    level = [m.label for m, sign in signs if sign != -1]
    if not level:
        return f"{best.label} has the lowest {word}"
    if len(level) == len(signs):
        return f"in {word} the methods are within seed noise of one another: {best.label}"
    return f"{best.label} has the lowest {word}, within seed noise of {listed(level)}"


def _against_rivals(
    hero: MethodSummary, rivals: Sequence[MethodSummary], kind: str = "balanced method"
) -> str:
    found = [(m, d) for m in rivals if (d := _difference("loss", hero, m)) is not None]
    judged = [(m.label, d.sign) for m, d in found if d.sign is not None]
    if not judged:
        return "with one shared seed, no order among the methods can be told" if found else ""
    lower = [label for label, sign in judged if sign == -1]
    higher = [label for label, sign in judged if sign == 1]
    level = [label for label, sign in judged if sign == 0]
    if not lower and not higher:
        if len(judged) == 1:
            return f"its loss and the loss of {judged[0][0]} differ by no more than seed noise"
        return (
            f"against each of the {len(judged)} other {kind}s its loss difference is within "
            "seed noise"
        )
    parts = [f"lower than with {listed(lower)}"] if lower else []
    parts += [f"higher than with {listed(higher)}"] if higher else []
    if level:
        others = level[0] if len(level) == 1 else f"the {len(level)} other {kind}s"
        parts.append(f"within seed noise of {others}")
    caveat = f" (95 % each, uncorrected for {len(judged)} comparisons)" if len(judged) > 1 else ""
    return f"its loss is {listed(parts)}{caveat}"


def _best_balance(hero: MethodSummary, rivals: Sequence[MethodSummary]) -> str:
    """Who is more even than the hero, beyond the noise of seeds."""
    found = [(m, _difference("maxvio", m, hero)) for m in rivals]
    better = [m for m, difference in found if difference is not None and difference.sign == -1]
    if not better:
        return ""
    best = min(better, key=lambda m: _mean(m, "maxvio"))
    return f"{best.label} has the lowest MaxVio, {_text(best, 'maxvio')}"


def _difference(metric: str, ours: MethodSummary, theirs: MethodSummary) -> Difference | None:
    return paired(ours.values.get(metric, {}), theirs.values.get(metric, {}))


def _seeds(difference: Difference | None) -> str:
    if difference is None:
        return "they share no seed, so their difference cannot be told from noise"
    if difference.n == 1:
        return "with one shared seed the noise is unknown"
    return f"over {difference.n} paired seeds"


def _loss_digits(difference: Difference) -> int:
    small = difference.half is not None and 0 < difference.half < 0.002
    return 4 if small else 3


def _mean(method: MethodSummary, metric: str) -> float:
    estimate = method.estimates.get(metric)
    return math.inf if estimate is None else estimate.mean


def _named(method: MethodSummary, metric: str) -> str:
    return f"{_WORDS[metric][0]} {_text(method, metric)}"


def _text(method: MethodSummary, metric: str) -> str:
    estimate = method.estimates[metric]
    digits = _WORDS[metric][1]
    return estimate.text(digits + 1 if abs(estimate.mean) < 0.1 else digits)


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
