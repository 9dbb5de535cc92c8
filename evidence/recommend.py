"""Which method `attach(model)` takes when you name none: the rule, and what it gives.

Eight candidates at their defaults train in three cells that differ in number of experts, gate and
batches (the recipes `recommend_e8`, `_e32` and `_e128`), on seeds that no report uses. The rule was
written before the runs:

1. A candidate's regret in a cell is its mean loss over the seeds less the lowest in that cell.
2. Candidates whose mean regret over the cells is within `NOISE` of the lowest are equal in loss.
3. Of these, take the one whose highest held-out MaxVio over the cells is the lowest.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

from evidence.study import Study

CELLS = ("recommend_e8", "recommend_e32", "recommend_e128")

NOISE = 0.03
"""Nats per byte: how far two seeds of one method differ at this size."""


class Score(NamedTuple):
    """A candidate over all cells: mean regret in loss, and the highest MaxVio."""

    regret: float
    maxvio: float


def scores(cells: Mapping[str, Study]) -> dict[str, Score]:
    """The score of each candidate that every cell has."""
    settings = [
        setting
        for setting in next(iter(cells.values())).settings()
        if all(setting in study.settings() for study in cells.values())
    ]
    lowest = {
        name: min(study.mean(setting, "loss") for setting in settings)
        for name, study in cells.items()
    }
    return {
        setting: Score(
            fmean(study.mean(setting, "loss") - lowest[name] for name, study in cells.items()),
            max(study.mean(setting, "maxvio") for study in cells.values()),
        )
        for setting in settings
    }


def recommend(found: Mapping[str, Score]) -> str:
    """The setting that the rule takes.

    >>> recommend({"a": Score(0.0, 0.9), "b": Score(0.02, 0.2), "c": Score(0.05, 0.1)})
    'b'
    """
    lowest = min(score.regret for score in found.values())
    equal = [name for name, score in found.items() if score.regret <= lowest + NOISE]
    return min(equal, key=lambda name: found[name].maxvio)
