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
    φ-balancing, else the only method that is here. If the leader was run with several settings, the
    one with the lowest validation loss speaks for it, and the sentence says so.
    """
    known = [m for m in methods if not m.partial and m.estimates]
    if not known:
        some = any(run.evals for m in methods for run in m.runs)
        lack = "reached its last evaluation" if some else "was evaluated"
        return f"No run {lack}, so there is nothing to compare yet."
    baseline = next((m for m in known if m.method == "none"), None)
    hero, name = _speaker(known)
    others = [m for m in known if m is not hero]
    if hero is None:
        parts = _level(known, baseline)
    else:
        rivals = [m for m in others if m.balances is not False and m is not baseline]
        parts = [
            _against_baseline(name, hero, baseline)
            if baseline and baseline is not hero
            else _alone(name, hero, others),
            _against_rivals(hero, rivals),
            _best_balance(hero, rivals),
        ]
    parts.append(_unknown_noise(hero or known[0], others))
    text = "; ".join(part for part in parts if part) or "There is no number to compare"
    return f"{text[0].upper() if text[0].isascii() else text[0]}{text[1:]}."


def _speaker(known: Sequence[MethodSummary]) -> tuple[MethodSummary | None, str]:
    """Of whom the sentence speaks, and what it is called; None among several rivals."""
    balanced = [m for m in known if m.method != "none"]
    lead = leader(m.method for m in known)
    if lead is None:
        hero = next(iter(balanced or known)) if len(balanced) < 2 else None
        return hero, hero.label if hero else ""
    settings = [m for m in balanced if m.method == lead]
    hero = min(settings, key=lambda m: _mean(m, "loss"))
    several = f" (the lowest validation loss of its {len(settings)} settings)"
    return hero, hero.label + (several if len(settings) > 1 and "loss" in hero.estimates else "")


def _against_baseline(name: str, hero: MethodSummary, baseline: MethodSummary) -> str:
    balance, loss = _difference("maxvio", hero, baseline), _difference("loss", hero, baseline)
    known = [d for d in (balance, loss) if d is not None]
    shared = [metric for metric in _WORDS if metric in hero.estimates.keys() & baseline.estimates]
    if not shared:
        return f"{name} and no balancing have no measured number in common"
    if all(d.sign is None for d in known):
        parts = [f"{_named(hero, metric)} against {_text(baseline, metric)}" for metric in shared]
        unpaired = (
            "" if known else "; they share no seed, so their difference cannot be told from noise"
        )
        return f"{name} shows {' and '.join(parts)} without balancing{unpaired}"
    tail = f"over {max(d.n for d in known)} paired seeds"
    if balance is None or loss is None:
        words = _loss_words(loss) if loss else _balance_words(hero, baseline, balance)
        missing = "MaxVio" if loss else "validation loss"
        return f"{name} {words} {tail}; there is no {missing} to compare"
    first, second = _balance_words(hero, baseline, balance), _loss_words(loss)
    joint = ", but" if (balance.sign, loss.sign) in {(-1, 1), (0, -1), (1, -1)} else " and"
    return f"{name} {first}{joint} {second} {tail}"


def _balance_words(
    hero: MethodSummary, baseline: MethodSummary, difference: Difference | None
) -> str:
    assert difference is not None
    after, before = _text(hero, "maxvio"), _text(baseline, "maxvio")
    if difference.sign is None:
        return f"shows MaxVio {after} against {before} with no balancing (noise unknown)"
    if difference.sign == 0:
        unsure = f"({difference.n} seeds cannot tell this from noise)"
        return f"shows MaxVio {after} against {before} with no balancing {unsure}"
    verb = "cut" if difference.sign < 0 else "raised"
    return f"{verb} MaxVio from {before} (no balancing) to {after}"


def _loss_words(difference: Difference) -> str:
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
        return f"left validation loss within seed noise (change {change}, {interval})"
    return f"{verb} validation loss by {size} ({interval})"


def _alone(name: str, hero: MethodSummary, others: Sequence[MethodSummary]) -> str:
    """What it shows by itself, and what cannot be said without a run to compare it with."""
    parts = [_named(hero, metric) for metric in _WORDS if metric in hero.estimates]
    if hero.balances is False or hero.method in ("none", "trace", "monitor"):
        missing = "" if others else "there is nothing here to compare it with"
    else:
        missing = "no run without balancing is here, so what balancing itself gains cannot be said"
    shown = f"{name} shows {' and '.join(parts) or 'no measured number'}"
    return "; ".join(part for part in (shown, missing) if part)


def _level(known: Sequence[MethodSummary], baseline: MethodSummary | None) -> list[str]:
    """Who is lowest among several methods of which none leads."""
    balanced = [m for m in known if m is not baseline]
    balance = _lowest("maxvio", balanced)
    if balance and baseline and "maxvio" in baseline.estimates:
        balance += f", against {_text(baseline, 'maxvio')} with no balancing"
    return [balance, _lowest("loss", known)]


def _lowest(metric: str, methods: Sequence[MethodSummary]) -> str:
    """Who has the lowest: alone only if it is below every other one beyond the noise of seeds."""
    among = [m for m in methods if metric in m.estimates]
    if len(among) < 2:
        return ""
    best = min(among, key=lambda m: _mean(m, metric))
    signs = [(m, d.sign) for m in among if m is not best if (d := _difference(metric, best, m))]
    if not signs or any(sign is None for _, sign in signs):
        return ""
    word, many = _WORDS[metric][0], f" (95 % each, uncorrected for {len(signs)} comparisons)"
    caveat = many if len(signs) > 1 else ""
    level = [m for m, sign in signs if sign != -1]
    if not level:
        return f"{best.label} has the lowest {word}, {_text(best, metric)}{caveat}"
    words = listed([f"{m.label} ({_text(m, metric)})" for m in (best, *level)])
    if len(level) == len(signs):
        return f"{words} are within seed noise of one another in {word}{caveat}"
    return f"{words} have the lowest {word}, within seed noise of one another{caveat}"


def _unknown_noise(hero: MethodSummary, others: Sequence[MethodSummary]) -> str:
    """Said once, where no difference has more than one seed."""
    if not others:
        # A trace has no seed, and no second one to tell its noise.
        alone = hero.seeds == 1 and all(run.seed is not None for run in hero.used)
        return "with one seed the noise between seeds is unknown" if alone else ""
    found = [d for m in others for metric in _WORDS if (d := _difference(metric, hero, m))]
    if not found or any(d.sign is not None for d in found):
        return ""
    rivals = [m for m in (hero, *others) if m.method != "none"]
    order = ", so no order among the methods can be told" if len(rivals) > 1 else ""
    return f"with one shared seed the noise is unknown{order}"


def _against_rivals(hero: MethodSummary, rivals: Sequence[MethodSummary]) -> str:
    found = [(m, d) for m in rivals if (d := _difference("loss", hero, m)) is not None]
    judged = [(m.label, d.sign) for m, d in found if d.sign is not None]
    lower = [label for label, sign in judged if sign == -1]
    higher = [label for label, sign in judged if sign == 1]
    level = [label for label, sign in judged if sign == 0]
    if not judged:
        return ""
    if not lower and not higher:
        if len(judged) == 1:
            return f"its loss and the loss of {judged[0][0]} differ by no more than seed noise"
        return f"against each of the {len(judged)} others its loss difference is within seed noise"
    parts = [f"lower than with {listed(lower)}"] if lower else []
    parts += [f"higher than with {listed(higher)}"] if higher else []
    if level:
        parts.append(
            f"within seed noise of {level[0] if len(level) == 1 else f'the {len(level)} others'}"
        )
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
