"""Claim 3: negative entropy is the best of the potentials."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evidence.chapter import Finding, Verdict, cells, claim, heads, noise, table, text
from evidence.figures import Panel, Series, draw
from evidence.study import Studies, Study
from moebalance.report.canvas import CYCLE, LINES

BEST = "NegativeEntropy"
_METRICS = ("loss", "maxvio", "soft_maxvio")


@claim(
    slug="potentials",
    title="The nine potentials",
    text="Negative entropy balances best; the others follow far behind at the same strength "
    "(paper, Table 3: MaxVio 0.10 against 0.40 to 0.81).",
    rule="*holds* if the mean MaxVio of negative entropy is the lowest both ways and the slope "
    "explains less than half of the spread; *in part* if it is the lowest at equal strength only.",
    needs=("potentials",),
)
def chapter(studies: Studies) -> Finding:
    """From nine potentials at equal strength, and at equal slope."""
    study = studies["potentials"]
    equal = {potential(s): s for s in study.settings() if "unit='paper'" in s}
    sloped = {potential(s): s for s in study.settings() if "unit='paper'" not in s}
    rank, spread = zip(*(_rank(study, side) for side in (equal, sloped)), strict=True)
    verdict = Verdict.IN_PART if rank[0] == 1 else Verdict.NOT_HERE
    if rank == (1, 1) and spread[1] > 0.5 * spread[0]:
        verdict = Verdict.HOLDS
    sides = {"equal strength": equal, "equal slope": sloped}
    rows = [
        [name, *(c for side in sides.values() for c in cells(study, side[name], _METRICS))]
        for name in equal
    ]
    columns = [f"{head}, {kind}" for kind in sides for head in heads(_METRICS)]
    return Finding(
        verdict,
        f"At equal strength negative entropy has rank {rank[0]} of {len(equal)} by mean MaxVio, "
        f"and the means lie within {spread[0]:.2f} of each other. At equal slope it has rank "
        f"{rank[1]}, and they lie within {spread[1]:.2f}.",
        noise=noise({"mixed": study}, *_METRICS),
        body=text(
            "*Equal strength* is 0.0003125 in the paper's unit, `unit='paper'`. There a potential "
            "pushes in proportion to its slope at the uniform load, d∇φ/dm at 1/E: E = 32 for "
            "negative entropy, 1 for Euclidean, 0.25 for softplus. So it compares strengths, not "
            "potentials. *Equal slope* is the default, a strength of 0.01 in the unit that "
            "divides by the slope. For negative entropy both are one setting, run twice. Mixed "
            "micro-batches, 2000 steps.",
            table(["Potential", *columns], rows),
        ),
        figures={"curves": (_figure(study, sides), "MaxVio of training batches, mean over seeds.")},
    )


def _rank(study: Study, side: Mapping[str, str]) -> tuple[int, float]:
    """Place of negative entropy by MaxVio, and how far the means span."""
    found = {name: study.mean(setting, "maxvio") for name, setting in side.items()}
    place = 1 + sorted(found, key=found.__getitem__).index(BEST)
    return place, max(found.values()) - min(found.values())


def potential(setting: str) -> str:
    """The potential's name in a setting.

    >>> potential("phi(potential='Renyi', strength=0.32, rate=0.1)")
    'Renyi'
    """
    found = re.search(r"'([A-Z]\w+)'", setting)
    return BEST if found is None else found[1]


def _figure(study: Study, sides: Mapping[str, Mapping[str, str]]) -> Any:
    shown = []
    for title, side in sides.items():
        series = []
        for i, (name, setting) in enumerate(side.items()):
            style = {"color": CYCLE[i % len(CYCLE)], "linestyle": LINES[i // len(CYCLE)]}
            series.append(Series(name, *study.curve(setting, "maxvio"), style))
        shown.append(Panel(title, "step", "MaxVio of a training batch", series, log="y"))
    return draw(shown, columns=5, height=3.4)
