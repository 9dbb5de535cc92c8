"""Claim 3: negative entropy is the best of the potentials."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import moebalance.potentials
from evidence.chapter import Finding, Verdict, cells, claim, heads, noise, table, text
from evidence.figures import Panel, Series, draw
from evidence.study import Studies, Study
from moebalance.report.canvas import CYCLE, LINES

BEST, EXPERTS = "NegativeEntropy", 32
_METRICS = ("loss", "maxvio", "soft_maxvio")


@claim(
    slug="potentials",
    title="The nine potentials",
    text="Negative entropy balances best; the others follow far behind at the same strength "
    "(paper, Table 3: MaxVio 0.10 against 0.40 to 0.81).",
    rule="*holds* if at equal slope the mean MaxVio of negative entropy is the lowest, by more "
    "than the standard deviation of one run.",
    needs=("potentials", "rivals"),
)
def chapter(studies: Studies) -> Finding:
    """From nine potentials at equal slope."""
    study, rivals = studies["potentials"], studies["rivals"]
    settings = {potential(setting): setting for setting in study.settings()}
    vios = {name: study.mean(setting, "maxvio") for name, setting in settings.items()}
    ranked = sorted(vios, key=vios.__getitem__)
    spread = vios[ranked[-1]] - vios[ranked[0]]
    phi = rivals.estimate(rivals.setting("phi"), "maxvio")
    sd = 0.0 if phi is None else phi.sd or 0.0
    first = ranked[0] == BEST and vios[ranked[1]] - vios[BEST] > sd
    slopes = {name: getattr(moebalance.potentials, name)().slope(EXPERTS) for name in settings}
    rows = [
        [name, f"{slopes[name]:.3g}", *cells(study, setting, _METRICS)]
        for name, setting in settings.items()
    ]
    return Finding(
        Verdict.HOLDS if first else Verdict.NOT_HERE,
        f"At equal slope negative entropy has rank {1 + ranked.index(BEST)} of {len(ranked)} by "
        f"MaxVio, and the nine lie within {spread:.2f} of each other. MaxVio of one run of φ has a "
        f"standard deviation of {sd:.2f} over seeds.",
        noise=noise({"φ of chapter 2": rivals.only_setting("phi")}, *_METRICS),
        body=text(
            "In the paper's unit (`unit='paper'`) a potential pushes in proportion to its slope at "
            "the uniform load, d∇φ/dm at 1/E, which is 32 for negative entropy and 1 for the "
            "Euclidean potential. So at equal α most of the nine hardly push, and a comparison "
            "there compares strengths. *Equal slope* is the default here: the strength, 0.01, is "
            f"divided by the slope. Mixed micro-batches, 2000 steps, seeds {_seeds(study)}.",
            table(["Potential", "Slope", *heads(_METRICS)], rows),
        ),
        figures={"curves": (_figure(study, settings), "MaxVio of training batches.")},
    )


def _seeds(study: Study) -> str:
    return ", ".join(map(str, study.seeds()))


def potential(setting: str) -> str:
    """The potential's name in a setting.

    >>> potential("phi(potential='Renyi', strength=0.32, rate=0.1)")
    'Renyi'
    """
    found = re.search(r"'([A-Z]\w+)'", setting)
    return BEST if found is None else found[1]


def _figure(study: Study, settings: Mapping[str, str]) -> Any:
    series = []
    for i, (name, setting) in enumerate(settings.items()):
        style = {"color": CYCLE[i % len(CYCLE)], "linestyle": LINES[i // len(CYCLE)]}
        series.append(Series(name, *study.curve(setting, "maxvio"), style))
    title = "Nine potentials at equal slope"
    panel = Panel(title, "step", "MaxVio of a training batch", series, log="y")
    return draw([panel], columns=5, height=3.4)
