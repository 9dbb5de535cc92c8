"""Claim 2: better balance and lower loss than the Switch loss and the loss-free bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from evidence.choose import Cell, cell, choose
from evidence.figures import Panel, Series, draw, numbered, points
from evidence.study import METRICS, Studies, Study, family
from moebalance.report.canvas import look
from moebalance.report.estimates import number
from moebalance.report.methods import display_name
from moebalance.report.verdict import Difference, paired
from moebalance.words.methods import build_method

TEXTS = {"rivals": "mixed", "one_domain": "one domain each"}
"""Studies of φ and its rivals at their defaults, with words for their micro-batches."""
CELL, STRENGTHS = "recommend_e32", "strengths"
"""Studies of the defaults, and of other strengths, on one seed that no report uses."""
STRENGTH = 0.01
"""Of every cell of the grid. The default of the global-batch loss is a tenth of it."""
RECOMMENDED = "phi+loss-free(scale='nats')"
_METRICS = ("loss", "maxvio", "soft_maxvio", "mi", "dead_experts")
_EFFECTS = ("loss", "maxvio", "soft_maxvio", "mi")
_RIVALS = ("switch", "loss-free")
_SHOWN = (
    *("none", "switch", "global-batch", "ema-switch", "loss-free", "loss-free(scale='nats')"),
    *("smebu", "phi", "phi(load='hard')", RECOMMENDED),
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
    needs=(*TEXTS, CELL, STRENGTHS),
)
def chapter(studies: Studies) -> Finding:
    """From the studies of `TEXTS`, and from other strengths on another seed."""
    verdict, because = _judge(studies)
    return Finding(
        verdict,
        because,
        noise=noise({words: studies[name] for name, words in TEXTS.items()}, *_METRICS[:2], "mi"),
        body=text(
            "Every run has 2000 steps of 1024 bytes. Every method runs at its defaults, the same "
            "in both texts. *Mixed* is one micro-batch a step with text of all domains. *One "
            "domain each* is four micro-batches a step, each with text of one domain.",
            differences(pairs(studies), ("loss", "maxvio"), head="φ − rival, 95 % interval"),
            "The same for the recommended method:",
            differences(
                pairs(studies, RECOMMENDED, (*_RIVALS, "phi")),
                ("loss", "maxvio"),
                head=f"`{RECOMMENDED}` − rival, 95 % interval",
            ),
            *(
                f"### Micro-batches: {words}\n\n{seeds_of(studies[name])}\n\n"
                + settings_table(studies[name], _METRICS)
                for name, words in TEXTS.items()
            ),
            "### What a default costs",
            _regrets(studies[CELL], studies[STRENGTHS]),
            "### Which ingredient helps",
            _grid(studies["one_domain"]),
        ),
        figures={
            "pareto": (
                _figure(studies),
                "Loss against MaxVio at the defaults, mean ± sd over seeds. Lines connect other "
                "strengths of a method on one other seed: read their shape, not their level.",
            )
        },
    )


def seeds_of(study: Study) -> str:
    """How many seeds a study's settings have, in a sentence: not all have the most."""
    groups: dict[int, list[str]] = {}
    for setting in study.settings():
        groups.setdefault(len(study.runs(setting)), []).append(f"`{setting}`")
    most, *fewer = sorted(groups, reverse=True)
    rest = "; ".join(f"{count} for {', '.join(groups[count])}" for count in fewer)
    return f"{_count(most)} each{f', but {rest}' if rest else ''}."


def _count(seeds: int) -> str:
    return "One seed" if seeds == 1 else f"{seeds} seeds"


def pairs(
    studies: Studies, ours: str = "phi", rivals: Sequence[str] = _RIVALS
) -> list[tuple[str, Study, str, str]]:
    """Words, study, our setting and a rival's."""
    return [
        (f"{words}, {display_name(rival)}", study, study.setting(ours), study.setting(rival))
        for name, words in TEXTS.items()
        for study in [studies[name]]
        for rival in rivals
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
        f"Of {total} comparisons (loss and MaxVio, two rivals, {len(TEXTS)} texts) φ is "
        f"better in {won}, worse in {lost}, within seed noise in {total - won - lost}.",
    )


def _regrets(defaults: Study, others: Study) -> str:
    """Each method's default against the best setting that was tried, by the rule of `choose.py`."""
    same = [run for run in defaults.results if run.seed in others.seeds()]
    both = replace(defaults, results=(*same, *others.results))
    rows = []
    for name, best in choose(both).items():
        if name not in others.families():
            continue
        plain, count = defaults.setting(name), sum(family(s) == name for s in both.settings())
        numbers = [cells(both, s, ("loss", "maxvio")) for s in (plain, best)]
        lost = both.mean(plain, "loss") - both.mean(best, "loss")
        here, there = numbers
        rows.append([f"`{name}`", str(count), *here, f"`{best}`", *there, number(lost, 3)])
    heads = ["Method", "Settings", "Loss", "MaxVio", "Best", "Its loss", "Its MaxVio", "Regret"]
    seeds = ", ".join(map(str, both.seeds()))
    return text(
        f"Other strengths and speeds on seed {seeds}, mixed text. *Best* is found with hindsight: "
        "of a method's settings within 0.01 nats of its lowest loss, the one with the lowest "
        "MaxVio. *Regret* is the loss of the default less the loss of the best. One seed differs "
        "from another by about as much as most regrets here.",
        table(heads, rows),
    )


def _grid(study: Study) -> str:
    grid = sorted((str(found), s) for found, s in equals(study).items())
    rows = [[name, f"`{s}`", *cells(study, s, _METRICS)] for name, s in grid]
    effects = [
        [words, *(in_words(effect(study, *swap, m), METRICS[m][1]) for m in _EFFECTS)]
        for words, swap in _INGREDIENTS.items()
    ]
    return text(
        "A price in the loss has three ingredients: the load (hard or soft), its memory (batch, "
        "step or moving average, EMA) and the potential (linear or log). *Linear* is the Euclidean "
        "potential and *log* is negative entropy. Equal strengths push alike. All twelve cells at "
        f"a strength of {STRENGTH}, each micro-batch of one domain, on seed 0 or the mean of two:",
        table(["Cell", "Setting", *heads(_METRICS)], rows),
        "The effect of one ingredient is the mean difference of all pairs of cells that differ in "
        "nothing else, with a 95 % interval over these pairs.",
        table(["Ingredient", *heads(_EFFECTS)], effects),
    )


def equals(study: Study) -> dict[Cell, str]:
    """The setting of each cell of the grid; all have the same strength."""
    return {
        found: s
        for s in study.settings()
        if (found := cell(s)) and getattr(build_method(s), "strength", None) == STRENGTH
    }


def effect(study: Study, part: str, to: str, of: str, metric: str) -> Difference | None:
    """Mean difference over all pairs of cells that differ in one part only, and over seeds."""
    grid = equals(study)
    ours: dict[tuple[Cell, int], float] = {}
    theirs: dict[tuple[Cell, int], float] = {}
    for where, setting in grid.items():
        if getattr(where, part) == to:
            twin = next(c for c in grid if vars(c) == {**vars(where), part: of})
            for side, name in ((ours, setting), (theirs, grid[twin])):
                for seed, value in study.by_seed(name, metric).items():
                    side[where, seed] = value
    return paired(ours, theirs)


def _figure(studies: Studies) -> Any:
    shown = []
    for name, words in TEXTS.items():
        study = studies[name]
        settings = study.of(_SHOWN)
        series = _fronts(studies, settings, study) if name == "rivals" else []
        hard = list(filter(_hard, settings))
        series += points(
            study,
            settings,
            *("maxvio", "loss"),
            label=partial(_label, study),
            hollow=hard,
            numbers=numbered({s: study.method(s) for s in settings}, hard),
        )
        axes = ("MaxVio, log scale", "validation loss, nats/byte")
        shown.append(Panel(words, *axes, series, log="x"))
    return draw(shown, columns=5, height=3.6, width=9.4)


def _label(study: Study, setting: str) -> str:
    if setting == RECOMMENDED:
        return study.title(setting)
    marks = {", hard": _hard(setting), ", nats": "scale='nats'" in setting}
    return study.title(setting) + "".join(words for words, true in marks.items() if true)


def _hard(setting: str) -> bool:
    return "load='hard'" in setting


def _fronts(studies: Studies, shown: Sequence[str], study: Study) -> list[Series]:
    """A line through all strengths of each method."""
    found = []
    for setting in shown:
        front = sorted(
            (each.mean(s, "maxvio"), each.mean(s, "loss"))
            for each in (studies[CELL], studies[STRENGTHS])
            for s in each.settings()
            if family(s) == family(setting)
        )
        style = {"color": look(study.method(setting))["color"], "linewidth": 1, "alpha": 0.6}
        if len(front) > 1:
            x, y = zip(*front, strict=True)
            found.append(Series(None, x, y, style))
    return found
