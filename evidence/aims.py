"""How far loads are from what the settings of a study aim at, whichever of them is judged.

A method that knows the shares, or the groups, and one that does not are held against the same ones:
those that any setting of the study names, if they are one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from moebalance.metrics.expert_parallel import contiguous, rank_violation
from moebalance.proportions import Proportions

Loads = Sequence[Sequence[float]]
"""(L, E) hard load of every layer."""


@dataclass(frozen=True)
class Aim:
    """What loads are judged by, beside evenness.

    Attributes:
        proportions: (E,) of the load that experts shall have.
        groups: number of blocks of neighbours that shall have equal loads.
    """

    proportions: Proportions | None = None
    groups: int | None = None

    def judge(self, loads: Loads) -> dict[str, float]:
        """Means over layers.

        Returns:
            With shares `aim_maxvio`, the excess of the busiest expert over its share, and
            `aim_gap`, the total variation distance from them; with groups `group_maxvio`.
        """
        found = {}
        if self.proportions is not None:
            total = math.fsum(self.proportions)
            rho = [share / total for share in self.proportions]
            pairs = [list(zip(load, rho, strict=True)) for load in loads]
            found["aim_maxvio"] = statistics.fmean(max(f / r for f, r in p) - 1 for p in pairs)
            found["aim_gap"] = statistics.fmean(sum(abs(f - r) for f, r in p) / 2 for p in pairs)
        if self.groups is not None:
            excess = [rank_violation(load, contiguous(load, self.groups)) for load in loads]
            found["group_maxvio"] = statistics.fmean(excess)
        return found


def aim_of(settings: Iterable[str]) -> Aim:
    """What the settings of a study aim at, as far as they agree.

    >>> groups = "phi(potential={'name': 'Euclidean', 'groups': 2})"
    >>> aim_of(["none", "switch(proportions=[3, 1])", groups])
    Aim(proportions=(3, 1), groups=2)
    """
    from moebalance.potentials import Grouped
    from moebalance.words.methods import build_method

    methods = [build_method(setting) for setting in settings]
    proportions = {method.traits.aim for method in methods if method.traits.aim is not None}
    groups = {
        part.groups
        for method in methods
        for part in _parts(method)
        if isinstance(part, Grouped) and isinstance(part.groups, int)
    }
    return Aim(
        proportions.pop() if len(proportions) == 1 else None,
        groups.pop() if len(groups) == 1 else None,
    )


def _parts(value: Any) -> Iterator[Any]:
    """A method or potential, and everything that it is made of."""
    if isinstance(value, tuple):
        for item in value:
            yield from _parts(item)
    elif is_dataclass(value):
        yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
