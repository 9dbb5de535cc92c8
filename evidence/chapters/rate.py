"""Claim 4: a rate of 0.6 to 0.7 is best; and what a low rate with a large strength does."""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

from evidence.chapter import Chapter, Studies, Verdict, estimate, table
from evidence.figures import CYCLE, logarithmic, panels, titles
from evidence.results import Study
from moebalance.report.diagnosis.oscillation import Swing

_CLAIMED = (0.6, 0.7)
_SEQ_LEN = "seq_len"


def chapter(studies: Studies) -> Chapter:
    """From rates against strengths, and the same rates at a quarter of the tokens a step."""
    study, small = studies["rate"], studies["rate_small_steps"]
    strengths, rates = _axes(study)
    best = {
        (batching, a): min(rates, key=lambda r: _maxvio(study, a, r, batching))
        for batching in ("mixed", "one-domain")
        for a in strengths
    }
    verdict = Verdict.NOT_HERE if max(best.values()) < min(_CLAIMED) else Verdict.IN_PART
    if min(best.values()) >= 0.3:
        verdict = Verdict.HOLDS
    named = "; ".join(f"{batching}, α = {a}: {best[batching, a]}" for batching, a in best)
    swings = [
        [f"{a}", f"{r}", batching, *_swing_cells(study, a, r, batching)]
        for batching in ("mixed", "one-domain")
        for a in strengths
        for r in rates
        if any(s.oscillates for s in swings_of(study, a, r, batching))
    ]
    return Chapter(
        slug="rate",
        title="The averaging rate",
        claim="η between 0.6 and 0.7 works best (paper, ablation, at two million tokens a step).",
        verdict=verdict,
        because=f"The rate with the lowest MaxVio at {tokens_a_step(study)} tokens a step: {named}."
        " (Rule: holds if the best rate is at least 0.3 everywhere, not if it is below 0.6 "
        "everywhere.)",
        body="\n\n".join(
            [
                f"Over the evaluation set, seeds: {len(study.seeds())}; in one-domain runs "
                "a whole step is of one domain.",
                *(_map(study, batching, strengths, rates) for batching in ("mixed", "one-domain")),
                "### Oscillation",
                _why(),
                table(
                    ["Strength", "Rate", "Micro-batches", "Period, steps", "Swing, even shares"],
                    swings,
                )
                if swings
                else "None of these runs oscillates by the rule of `Swing.oscillates`.",
                "### From tokens to a rate",
                _memory(study, small),
            ]
        ),
        figures={
            "rate": (
                _figure(study, strengths, rates),
                "MaxVio against the rate; rings mark runs that oscillate.",
            )
        },
    )


def _why() -> str:
    return (
        "The price answers an average that lags 1/η steps behind, and the router answers the price "
        "with an inertia of its own: two delays in a loop. If the strength is large, the router "
        "has passed the balance before the average says so, and swings back. Table: runs in which "
        "a layer swings by more than a tenth of an even share and comes back (mean over layers and "
        "seeds). Loads that drift in few directions can pass the rule too, as runs without any "
        "memory, η = 1, show where they are listed: read the size of a swing, not the bare fact."
    )


def swings_of(study: Study, strength: float, rate: float, batching: str) -> list[Swing]:
    """Every layer of every seed."""
    runs = study.select(_setting(study, strength, rate), batching=batching)
    return [found for run in runs for found in run.swing or ()]


def _swing_cells(study: Study, strength: float, rate: float, batching: str) -> list[str]:
    found = [s for s in swings_of(study, strength, rate, batching) if s.oscillates]
    period = statistics.fmean(s.period for s in found)
    return [f"{period:.0f}", f"{statistics.fmean(s.amplitude for s in found):.2f}"]


def _setting(study: Study, strength: float, rate: float) -> str:
    return next(s for s in study.settings() if _numbers(s) == (strength, rate))


def _numbers(setting: str) -> tuple[float, float]:
    """(strength, rate) of `phi(strength=…, rate=…)`."""
    found = re.fullmatch(r"phi\(strength=([\d.]+), rate=([\d.]+)\)", setting)
    if found is None:
        raise ValueError(f"{setting!r} is not of the form phi(strength=…, rate=…).")
    return float(found[1]), float(found[2])


def _axes(study: Study) -> tuple[list[float], list[float]]:
    pairs = [_numbers(setting) for setting in study.settings()]
    return sorted({a for a, _ in pairs}), sorted({r for _, r in pairs})


def _maxvio(study: Study, strength: float, rate: float, batching: str) -> float:
    return study.mean(_setting(study, strength, rate), "maxvio", batching=batching)


def _map(study: Study, batching: str, strengths: list[float], rates: list[float]) -> str:
    rows = [
        [
            f"{words}, α = {a}",
            *(
                estimate(study, _setting(study, a, r), metric, digits, batching=batching)
                for r in rates
            ),
        ]
        for words, metric, digits in (
            ("MaxVio", "maxvio", 2),
            ("loss", "loss", 3),
            ("dead experts", "dead_experts", 1),
        )
        for a in strengths
    ]
    return table([batching, *(f"η = {r}" for r in rates)], rows)


def tokens_a_step(study: Study) -> int:
    """Tokens of a step in every run of a study."""
    recipe = study.about["recipe"]
    train = recipe["train"]
    return int(train["batch_size"] * train["accumulation"] * recipe["data"][_SEQ_LEN])


def _memory(study: Study, small: Study) -> str:
    rows = []
    strength = 0.01
    for each in (study, small):
        _, rates = _axes(each)
        for batching in ("mixed", "one-domain"):
            best = min(rates, key=lambda r: _maxvio(each, strength, r, batching))
            memory = -tokens_a_step(each) / math.log1p(-best) if best < 1 else 0.0
            lowest = _maxvio(each, strength, best, batching)
            rows.append(
                [f"{tokens_a_step(each)}", batching, f"{best}", f"{memory:,.0f}", f"{lowest:.2f}"]
            )
    return "\n\n".join(
        [
            "If what matters is how many *tokens* the average remembers, M = −n / ln(1 − η) for n "
            f"tokens a step, then the best M should be the same whatever n is. At α = {strength}:",
            table(["Tokens a step", "Micro-batches", "Best η", "M, tokens", "MaxVio"], rows),
            "Rule: choose the memory, not the rate. Let M span several changes of domain (tens of "
            "thousands of tokens here) and give it as `memory_tokens=`; a rate of 0.6 at two "
            "million tokens a step is a memory of 2.2 million tokens, far more than any here.",
        ]
    )


def _figure(study: Study, strengths: list[float], rates: list[float]) -> Any:
    figure, axes = panels(2)
    for ax, batching in zip(axes, ("mixed", "one-domain"), strict=True):
        for i, a in enumerate(strengths):
            values = [_maxvio(study, a, r, batching) for r in rates]
            ax.plot(rates, values, "o-", color=CYCLE[i], markersize=4, label=f"α = {a}")
            rings = [
                (r, v)
                for r, v in zip(rates, values, strict=True)
                if any(s.oscillates for s in swings_of(study, a, r, batching))
            ]
            if rings:
                x, y = zip(*rings, strict=True)
                ax.plot(x, y, "o", markersize=11, fillstyle="none", color=CYCLE[i])
        logarithmic(ax, x=True, y=True)
        titles(ax, f"{batching} micro-batches", "rate η", "MaxVio")
    axes[0].legend()
    return figure
