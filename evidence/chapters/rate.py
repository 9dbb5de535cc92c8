"""Claim 4: a rate of 0.6 to 0.7 is best; and what a low rate with a large strength does."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evidence.chapter import Finding, Verdict, cells, claim, noise, table, text
from evidence.figures import Panel, Series, draw
from evidence.study import METRICS, Studies, Study
from moebalance.report.canvas import CYCLE
from moebalance.report.diagnosis.oscillation import Swing

_CLAIMED = (0.6, 0.7)
_METRICS = ("maxvio", "loss", "dead_experts")


@dataclass(frozen=True)
class Sweep:
    """Strengths against rates, in one kind of micro-batch."""

    study: Study

    @cached_property
    def settings(self) -> dict[tuple[float, float], str]:
        """Each setting by its strength and rate."""
        return {_numbers(setting): setting for setting in self.study.settings()}

    @property
    def strengths(self) -> list[float]:
        """Every strength, the smallest first."""
        return sorted({a for a, _ in self.settings})

    @property
    def rates(self) -> list[float]:
        """Every η, the smallest first."""
        return sorted({r for _, r in self.settings})

    def maxvio(self, strength: float, rate: float) -> float:
        """Mean over seeds."""
        return self.study.mean(self.settings[strength, rate], "maxvio")

    def best(self, strength: float) -> float:
        """The rate with the lowest mean MaxVio."""
        return min(self.rates, key=lambda rate: self.maxvio(strength, rate))

    def swings(self, strength: float, rate: float) -> list[Swing]:
        """Of every layer of every seed, those that oscillate."""
        runs = self.study.runs(self.settings[strength, rate])
        return [swing for run in runs for swing in run.swing or () if swing.oscillates]


@claim(
    slug="rate",
    title="The averaging rate",
    text="η between 0.6 and 0.7 works best (paper, ablation, at two million tokens a step).",
    rule="*holds* if the rate with the lowest mean MaxVio is at least 0.3 everywhere, *does not* "
    "if it is below 0.6 everywhere.",
    needs=("rate", "rivals"),
)
def chapter(studies: Studies) -> Finding:
    """From rates against strengths."""
    study = studies["rate"]
    sweeps = {batching: Sweep(study.only(batching)) for batching in study.batchings()}
    best = {(name, a): each.best(a) for name, each in sweeps.items() for a in each.strengths}
    verdict = Verdict.NOT_HERE if max(best.values()) < min(_CLAIMED) else Verdict.IN_PART
    if min(best.values()) >= 0.3:
        verdict = Verdict.HOLDS
    vios = [sweep.maxvio(*each) for sweep in sweeps.values() for each in sweep.settings]
    spread, phi = max(vios) - min(vios), studies["rivals"].estimate("phi", "maxvio")
    sd = 0.0 if phi is None else phi.sd or 0.0
    named = "; ".join(f"{name}, strength {a}: {rate}" for (name, a), rate in best.items())
    return Finding(
        verdict,
        f"The rate with the lowest mean MaxVio at {study.tokens_a_step()} tokens a step: {named}. "
        f"MaxVio of all rates lies within {spread:.2f}. One run of φ has a standard deviation of "
        f"{sd:.2f} over seeds, so {'a trend shows' if spread > 2 * sd else 'no rate is better'}.",
        noise=noise({"φ of chapter 2": studies["rivals"].only_setting("phi")}, *_METRICS),
        body=text(
            f"Mixed micro-batches, 2000 steps, seeds {', '.join(map(str, study.seeds()))}. The "
            "default is a memory of 10,000 tokens, a rate of 0.1 here.",
            *(_map(name, sweep) for name, sweep in sweeps.items()),
            "### Oscillation",
            _oscillation(sweeps),
            "### From tokens to a rate",
            _memory(study),
        ),
        figures={
            "rate": (_figure(sweeps), "MaxVio against the rate; rings mark runs that oscillate.")
        },
    )


def _numbers(setting: str) -> tuple[float, float]:
    """(strength, rate) of `phi(strength=…, rate=…)`."""
    found = re.fullmatch(r"phi\(strength=([\d.]+), rate=([\d.]+)\)", setting)
    if found is None:
        raise ValueError(f"{setting!r} is not of the form phi(strength=…, rate=…).")
    return float(found[1]), float(found[2])


def _map(batching: str, sweep: Sweep) -> str:
    rows = []
    for metric in _METRICS:
        for a in sweep.strengths:
            found = [cells(sweep.study, sweep.settings[a, r], [metric])[0] for r in sweep.rates]
            rows.append([f"{METRICS[metric][0]}, strength {a}", *found])
    return table([batching, *(f"η = {r}" for r in sweep.rates)], rows)


def _oscillation(sweeps: dict[str, Sweep]) -> str:
    rows = []
    for batching, sweep in sweeps.items():
        for a, r in sorted(sweep.settings):
            if found := sweep.swings(a, r):
                period = statistics.fmean(swing.period for swing in found)
                size = statistics.fmean(swing.amplitude for swing in found)
                rows.append([f"{a}", f"{r}", batching, f"{period:.0f}", f"{size:.2f}"])
    if not rows:
        return "None of these runs oscillates by the rule of `Swing.oscillates`."
    columns = ["Strength", "Rate", "Micro-batches", "Period, steps", "Swing, even loads"]
    return text(
        "The price follows an average that lags 1/η steps behind. The router follows the price "
        "with an inertia of its own. These are two delays in a loop: if the strength is large, the "
        "router has passed the balance before the average says so, and swings back. The table has "
        "the runs in which a layer swings by more than a tenth of an even load and comes back: "
        "mean over those layers and seeds. Loads that drift in a few directions can pass this rule "
        "too. Runs with η = 1, which have no memory, show it. So read the size of a swing.",
        table(columns, rows),
    )


def _memory(study: Study) -> str:
    tokens, rows = study.tokens_a_step(), []
    for batching in study.batchings():
        sweep = Sweep(study.only(batching))
        for strength in sweep.strengths:
            best = sweep.best(strength)
            memory = -tokens / math.log1p(-best) if best < 1 else 0.0
            lowest = f"{sweep.maxvio(strength, best):.2f}"
            rows.append([batching, f"{strength}", f"{best}", f"{memory:,.0f}", lowest])
    return text(
        "An average remembers M = −n / ln(1 − η) tokens if a step has n, here "
        f"{tokens}. The rate with the lowest mean MaxVio, as a memory:",
        table(["Micro-batches", "Strength", "η", "M, tokens", "MaxVio"], rows),
        "A rate of 0.6 at two million tokens a step, the paper's, is a memory of 2.2 million "
        "tokens. So give a memory in tokens, not a rate: "
        "[chapter 12](#12-a-memory-in-tokens) has both at two sizes of a step.",
    )


def _figure(sweeps: dict[str, Sweep]) -> Any:
    shown = []
    for batching, sweep in sweeps.items():
        series = []
        for colour, a in zip(CYCLE, sweep.strengths, strict=False):
            y = [sweep.maxvio(a, r) for r in sweep.rates]
            style = {"fmt": "o-", "color": colour, "markersize": 4}
            series += [Series(f"strength {a}", sweep.rates, y, style), _rings(sweep, a, colour)]
        shown.append(Panel(f"{batching} micro-batches", "rate η", "MaxVio", series, log="x"))
    figure = draw(shown)
    for axes in figure.axes:
        axes.set_ylim(bottom=0)  # else noise fills the picture
    return figure


def _rings(sweep: Sweep, strength: float, colour: str) -> Series:
    x: Sequence[float] = [r for r in sweep.rates if sweep.swings(strength, r)]
    style = {"fmt": "o", "markersize": 11, "fillstyle": "none", "color": colour}
    return Series(None, x, [sweep.maxvio(strength, r) for r in x], style)
