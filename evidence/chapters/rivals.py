"""Claim 2: better balance and lower loss than the Switch loss and the loss-free bias."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from evidence.chapter import (
    Finding,
    Verdict,
    cells,
    claim,
    differences,
    heads,
    in_words,
    noise,
    settings_table,
    sign,
    table,
    text,
)
from evidence.choose import Cell, cell
from evidence.figures import Panel, Series, draw, points
from evidence.study import METRICS, Studies, Study, family
from moebalance.report.canvas import look
from moebalance.report.methods import display_name
from moebalance.report.verdict import Difference, paired

TEXTS = {"rivals": "mixed", "grid": "one-domain", "corpora": "one-domain, other text"}
"""Studies of φ and its rivals, with words for their micro-batches; the last may be missing."""
SWEEPS = {"grid": "sweep", "rivals": "sweep_mixed"}
"""All strengths in the micro-batches of a study; those of mixed ones may be missing."""
_METRICS = ("loss", "maxvio", "soft_maxvio", "mi", "dead_experts")
_EFFECTS = ("loss", "maxvio", "soft_maxvio", "mi")
_RIVALS = ("switch", "loss-free")
_SHOWN = (
    *("none", "switch", "global-batch", "ema-switch"),
    *("loss-free", "phi", "phi(load='hard')", "phi+loss-free"),
)
_INGREDIENTS = {
    "soft instead of hard": ("load", "soft", "hard"),
    "step instead of batch": ("memory", "step", "batch"),
    "EMA instead of step": ("memory", "EMA", "step"),
    "log instead of linear": ("potential", "log", "linear"),
}


@claim(
    slug="rivals",
    title="Against the rivals",
    text="φ-balancing reaches better balance and lower validation loss than Switch-style losses "
    "and the loss-free bias (paper, Fig. 2 and Table 2).",
    rule="*holds* if φ is better beyond seed noise in every comparison, *in part* if in some.",
    needs=("rivals", "grid", "sweep"),
)
def chapter(studies: Studies) -> Finding:
    """From the sweeps of strengths, and the studies of `TEXTS`."""
    verdict, because = _judge(studies)
    each = there(studies)
    return Finding(
        verdict,
        because,
        noise=noise({words: studies[name] for name, words in each}, "loss", "maxvio", "mi"),
        body=text(
            differences(pairs(studies), ("loss", "maxvio"), head="φ − rival, 95 % interval"),
            "These runs stop at 400 steps, when the models have learnt little. Every method after "
            "2000 steps, at its defaults, is in [chapter 13](#13-one-default-for-all).",
            "Strengths were chosen on seeds 100 and 101 in one-domain micro-batches, by the rule "
            "of `evidence/choose.py`: of the settings of a method within 0.01 nats of its lowest "
            "loss, the one with the lowest MaxVio. The runs below have other seeds. The same "
            "setting is used everywhere, and every run has the same tokens, steps and model. "
            "*Other text* is seven domains of [corpora](corpora.md) instead of the text of Python "
            "(`evidence/recipes/corpora.toml`).",
            *(
                f"### Micro-batches: {words}, {len(studies[name].seeds())} seeds\n\n"
                + settings_table(studies[name], _METRICS)
                for name, words in each
            ),
            "### Which ingredient helps",
            _grid(studies["sweep"]),
            *(
                _effects(studies[sweep], TEXTS[name])
                for name, sweep in SWEEPS.items()
                if sweep in studies
            ),
        ),
        figures={
            "pareto": (
                _figure(studies),
                "Loss against MaxVio. Marks are the chosen strengths, mean ± sd over seeds. Lines "
                "connect every strength of the sweeps, which have two other seeds: read their "
                "shape, not their level.",
            )
        },
    )


def there(studies: Studies) -> list[tuple[str, str]]:
    """Name and words of each of `TEXTS` whose results are committed."""
    return [(name, words) for name, words in TEXTS.items() if name in studies]


def pairs(studies: Studies) -> list[tuple[str, Study, str, str]]:
    """Words, study, φ and a rival."""
    return [
        (f"{words}, {display_name(rival)}", study, study.setting("phi"), study.setting(rival))
        for name, words in there(studies)
        for study in [studies[name]]
        for rival in _RIVALS
    ]


def _judge(studies: Studies) -> tuple[Verdict, str]:
    found = [
        sign(study.less(phi, rival, metric))
        for _, study, phi, rival in pairs(studies)
        for metric in ("loss", "maxvio")
    ]
    won, lost, total = found.count(-1), found.count(1), len(found)
    verdict = Verdict.IN_PART if won else Verdict.NOT_HERE
    return (
        Verdict.HOLDS if won == total else verdict,
        f"Of {total} comparisons (loss and MaxVio, two rivals, {len(there(studies))} studies) φ is "
        f"better in {won}, worse in {lost}, within seed noise in {total - won - lost}.",
    )


def _grid(sweep: Study) -> str:
    grids = matched(sweep)
    middle = sorted(grids[len(grids) // 2].items(), key=lambda item: str(item[0]))
    rows = [[str(c), f"`{s}`", *cells(sweep, s, _METRICS)] for c, s in middle]
    return text(
        "A price in the loss has three ingredients: the load (hard or soft), its memory (batch, "
        "step or moving average, EMA) and the potential (linear or log). *Linear* is the Euclidean "
        "potential and *log* is negative entropy. Equal strengths push alike. The table has all "
        f"twelve cells at the middle one of {len(grids)} strengths, in one-domain micro-batches, "
        f"{len(sweep.seeds())} seeds.",
        table(["Cell", "Setting", *heads(_METRICS)], rows),
        "The next tables show the effect of one ingredient: the mean difference of all pairs of "
        "cells that differ in nothing else, over all strengths, paired over seeds, with its 95 % "
        "interval. Two seeds make these intervals wide.",
    )


def matched(sweep: Study) -> list[dict[Cell, str]]:
    """The sweep's grids of equal push: the weakest setting of every cell, then the next."""
    ladder: dict[Cell, list[str]] = {}
    for setting in sweep.settings():
        if (where := cell(setting)) is not None:
            ladder.setdefault(where, []).append(setting)
    levels = min(map(len, ladder.values()))
    return [{where: settings[i] for where, settings in ladder.items()} for i in range(levels)]


def _effects(study: Study, batching: str) -> str:
    grids = matched(study)
    rows = [
        [words, *(in_words(effect(study, grids, *swap, m), METRICS[m][1]) for m in _EFFECTS)]
        for words, swap in _INGREDIENTS.items()
    ]
    return table([f"Ingredient, {batching}", *heads(_EFFECTS)], rows)


def effect(
    study: Study, grids: Sequence[dict[Cell, str]], part: str, to: str, of: str, metric: str
) -> Difference | None:
    """Mean difference over all pairs of cells that differ in one part only, paired over seeds."""
    sides: tuple[dict[int, list[float]], dict[int, list[float]]] = ({}, {})
    for grid in grids:
        for where, setting in grid.items():
            if getattr(where, part) != to:
                continue
            twin = next(c for c in grid if vars(c) == {**vars(where), part: of})
            for side, name in zip(sides, (setting, grid[twin]), strict=True):
                for seed, value in study.by_seed(name, metric).items():
                    side.setdefault(seed, []).append(value)
    means = [{seed: statistics.fmean(v) for seed, v in side.items()} for side in sides]
    return paired(*means)


def _figure(studies: Studies) -> Any:
    shown = []
    for name, batching in there(studies):
        study, sweep = studies[name], studies.get(SWEEPS.get(name, ""))
        settings = study.of(_SHOWN)
        series = _fronts(sweep, settings, study) if sweep else []
        series += points(
            study,
            settings,
            *("maxvio", "loss"),
            label=partial(_label, study),
            hollow=list(filter(_hard, settings)),
        )
        axes = ("MaxVio, log scale", "validation loss, nats/byte")
        shown.append(Panel(batching, *axes, series, log="x"))
    return draw(shown, columns=7, height=3.4, width=9.4)


def _label(study: Study, setting: str) -> str:
    return study.title(setting) + (", hard" if _hard(setting) else "")


def _hard(setting: str) -> bool:
    return "load='hard'" in setting


def _fronts(sweep: Study, shown: Sequence[str], study: Study) -> list[Series]:
    """A line through all strengths of each method."""
    found = []
    for setting in shown:
        settings = [s for s in sweep.settings() if family(s) == family(setting)]
        front = sorted((sweep.mean(s, "maxvio"), sweep.mean(s, "loss")) for s in settings)
        style = {"color": look(study.method(setting))["color"], "linewidth": 1, "alpha": 0.6}
        if len(front) > 1:
            x, y = zip(*front, strict=True)
            found.append(Series(None, x, y, style))
    return found
