"""Claim 2: better balance and lower loss than the Switch loss and the loss-free bias."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from evidence.chapter import (
    Chapter,
    Studies,
    Verdict,
    difference,
    estimate,
    in_words,
    table,
)
from evidence.choose import NAMES, Cell, cell, family
from evidence.figures import legend_below, logarithmic, look, panels, point, titles
from evidence.results import Study
from moebalance.report.methods import display_name
from moebalance.report.verdict import Difference, paired

_METRICS = (("loss", 3), ("maxvio", 2), ("soft_maxvio", 2), ("mi", 3), ("dead_experts", 1))
_HEADS = ("Validation loss", "MaxVio", "Soft MaxVio", "Domain MI", "Dead experts")
_RIVALS = ("switch", "loss-free")
_SHOWN = (
    "none",
    "switch",
    "global-batch",
    "ema-switch(rate=0.1)",
    "loss-free",
    "phi",
    "phi(load='hard')",
    "phi+loss-free",
)
TEXTS = {"rivals": "mixed", "grid": "one-domain", "corpora": "one-domain, other text"}
"""Studies of φ and its rivals, with words for their micro-batches; the last may be missing."""
SWEEPS = {"grid": "sweep", "rivals": "sweep_mixed"}
"""All strengths in the micro-batches of a study; that of mixed ones may be missing."""


def chapter(studies: Studies) -> Chapter:
    """From the sweeps (strengths) and the studies of `TEXTS`."""
    verdict, because = _judge(studies)
    parts = [
        "Strengths were chosen on seeds 100 and 101 in one-domain micro-batches, by the rule "
        "of `evidence/choose.py`: of a method's settings within 0.01 nats of its lowest loss, the "
        "one with the lowest MaxVio. What follows are other seeds of another run. The same "
        "setting is used everywhere. Every run has the same tokens, steps and model. On other "
        "text than Python's, seven domains of [corpora](corpora.md), the same comparison is "
        "`evidence/recipes/corpora.toml`.",
    ]
    for name, batching in there(studies).items():
        study = studies[name]
        title = f"### Micro-batches: {batching}, {len(study.seeds())} seeds"
        parts += [title, _methods(study)]
    parts += ["### Which ingredient helps", _grid(studies)]
    return Chapter(
        slug="rivals",
        title="Against the rivals",
        claim="φ-balancing reaches better balance and lower validation loss than Switch-style "
        "losses and the loss-free bias (paper, Fig. 2 and Table 2).",
        verdict=verdict,
        because=because,
        body="\n\n".join(parts),
        figures={
            "pareto": (
                _pareto(studies),
                "Loss against MaxVio. Lines: every strength of the sweeps (two other seeds: read "
                "their shape, not their level). Marks: the "
                "chosen strengths on other seeds, with ± sd.",
            )
        },
    )


def _judge(studies: Studies) -> tuple[Verdict, str]:
    words, won, lost = [], 0, 0
    for name, batching in there(studies).items():
        study = studies[name]
        phi = setting_of(study, "phi")
        for rival in _RIVALS:
            other = setting_of(study, rival)
            loss = difference(study, phi, other, "loss")
            balance = difference(study, phi, other, "maxvio")
            for found in (loss, balance):
                won += found is not None and found.sign == -1
                lost += found is not None and found.sign == 1
            words.append(
                f"{batching}, φ − {display_name(rival)}: loss {in_words(loss)}, MaxVio "
                f"{in_words(balance, 2)}"
            )
    total = 2 * len(there(studies)) * len(_RIVALS)
    verdict = Verdict.IN_PART if won else Verdict.NOT_HERE
    if won == total:
        verdict = Verdict.HOLDS
    count = (
        f"Of {total} comparisons (loss and MaxVio, two rivals, each study) φ is better in "
        f"{won}, worse in {lost}, within seed noise in {total - won - lost}. "
    )
    tail = ". Paired over seeds, 95 % intervals, uncorrected."
    return verdict, count + "; ".join(words) + tail


def setting_of(study: Study, name: str) -> str:
    """The setting of a family that a study ran.

    Raises:
        KeyError: it ran none.
    """
    for setting in study.settings():
        if family(setting) == name:
            return setting
    raise KeyError(f"{study.name} has no setting of {name!r}; it has {study.settings()}.")


def there(studies: Studies) -> dict[str, str]:
    """Those of `TEXTS` whose results are committed."""
    return {name: words for name, words in TEXTS.items() if name in studies}


def ran(study: Study, names: Iterable[str]) -> list[str]:
    """Those of the families that a study ran."""
    there = set(map(family, study.settings()))
    return [name for name in names if name in there]


def _methods(study: Study) -> str:
    rows = []
    for setting in study.settings():
        cells = [estimate(study, setting, metric, digits) for metric, digits in _METRICS]
        rows.append([f"`{setting}`", *cells])
    return table(["Method", *_HEADS], rows)


def _grid(studies: Studies) -> str:
    sweep = studies["sweep"]
    grids = matched(sweep)
    middle = grids[len(grids) // 2]
    rows = []
    for where, setting in middle.items():
        numbers = [estimate(sweep, setting, metric, digits) for metric, digits in _METRICS]
        name = f" ({NAMES[where]})" if where in NAMES else ""
        rows.append([f"{where}{name}", f"`{setting}`", *numbers])
    rows.sort()
    parts = [
        "All twelve cells of {hard, soft} × {batch, step, EMA} × {linear, log}, in one-domain "
        "micro-batches, from the sweep, whose strengths push alike: α for log, 32 α for "
        "linear. Linear is the Euclidean potential, log negative entropy; Switch, "
        "global-batch, EMA-Switch and both ends of φ-balancing are corners. At the middle one "
        "of three strengths, two seeds:",
        table(["Cell", "Setting", *_HEADS], rows),
        "The effect of one ingredient, averaged over all cells that differ in nothing else "
        "and over the three strengths, paired over seeds, with its 95 % interval. With two "
        "seeds the intervals are wide:",
    ]
    for study, name in SWEEPS.items():
        if name in studies:
            heads = [f"Ingredient, {TEXTS[study]}", "Loss", "MaxVio", "Soft MaxVio", "Domain MI"]
            parts.append(table(heads, _effects(studies[name], matched(studies[name]))))
    return "\n\n".join(parts)


def matched(sweep: Study) -> list[dict[Cell, str]]:
    """The sweep's grids of equal push: the weakest setting of every cell, then the next."""
    ladder: dict[Cell, list[str]] = {}
    for setting in sweep.settings():
        if (where := cell(setting)) is not None:
            ladder.setdefault(where, []).append(setting)
    levels = min(map(len, ladder.values()))
    return [{where: settings[i] for where, settings in ladder.items()} for i in range(levels)]


_INGREDIENTS = (
    ("soft instead of hard", "load", "soft", "hard"),
    ("step instead of batch", "memory", "step", "batch"),
    ("EMA instead of step", "memory", "EMA", "step"),
    ("log instead of linear", "potential", "log", "linear"),
)


def _effects(study: Study, grids: Sequence[dict[Cell, str]]) -> list[list[str]]:
    metrics = (("loss", 3), ("maxvio", 2), ("soft_maxvio", 2), ("mi", 3))
    return [
        [words, *(in_words(effect(study, grids, part, to, of, m), d) for m, d in metrics)]
        for words, part, to, of in _INGREDIENTS
    ]


def effect(
    study: Study, grids: Sequence[dict[Cell, str]], part: str, to: str, of: str, metric: str
) -> Difference | None:
    """Mean difference over all pairs of cells that differ in one part only, paired over seeds."""
    sides: tuple[dict[int, list[float]], dict[int, list[float]]] = ({}, {})
    for cells in grids:
        for where, setting in cells.items():
            if getattr(where, part) != to:
                continue
            twin = next(c for c in cells if vars(c) == {**vars(where), part: of})
            for side, name in zip(sides, (setting, cells[twin]), strict=True):
                for seed, value in study.by_seed(name, metric).items():
                    side.setdefault(seed, []).append(value)
    means = [{seed: statistics.fmean(v) for seed, v in side.items()} for side in sides]
    return paired(*means)


def _pareto(studies: Studies) -> Any:
    figure, axes = panels(len(there(studies)), height=3.4, width=9.4)
    for ax, (name, batching) in zip(axes, there(studies).items(), strict=True):
        study = studies[name]
        for wanted in ran(study, _SHOWN):
            setting = setting_of(study, wanted)
            style = look(study.select(setting)[0].method)
            hard = wanted == "phi(load='hard')"
            label = display_name(study.select(setting)[0].method) + (", hard" if hard else "")
            if SWEEPS.get(name) in studies:
                _front(ax, studies[SWEEPS[name]], wanted, style["color"])
            fill = {"markerfacecolor": "white"} if hard else {}
            point(ax, study, setting, "maxvio", "loss", label=label, **style, **fill)
        logarithmic(ax, x=True)
        titles(ax, batching, "MaxVio, log scale", "validation loss, nats/byte")
    legend_below(figure, axes[1], columns=7)
    return figure


def _front(ax: Any, sweep: Study, wanted: str, colour: str) -> None:
    settings = [s for s in sweep.settings() if family(s) == wanted]
    points = sorted((sweep.mean(s, "maxvio"), sweep.mean(s, "loss")) for s in settings)
    if len(points) > 1:
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=1, alpha=0.6)
