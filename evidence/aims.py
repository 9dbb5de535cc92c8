"""How far loads are from what a study aims at: given proportions, or equal groups of experts.

All settings of a study are judged by the same aim, also a setting that knows nothing of it. The aim
is what the other settings name, if they agree.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from moebalance.metrics.expert_parallel import contiguous, rank_violation
from moebalance.potentials import Grouped
from moebalance.proportions import Proportions
from moebalance.words.methods import build_method


@dataclass(frozen=True)
class Aim:
    """What loads are judged by, in addition to evenness.

    Attributes:
        proportions: (E,) target parts of the load; they need not sum to 1.
        groups: number of blocks of neighbours that should have equal loads.
    """

    proportions: Proportions | None = None
    groups: int | None = None

    def judge(self, loads: Sequence[Sequence[float]]) -> dict[str, float]:
        """Means over layers.

        Args:
            loads: (L, E) hard load of every layer.

        Returns:
            With proportions `aim_maxvio`, the largest relative excess of an expert over its
            proportion, and `aim_gap`, the total variation distance. With groups `group_maxvio`.
        """
        found = {}
        if self.proportions is not None:
            total = math.fsum(self.proportions)
            rho = [part / total for part in self.proportions]
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
    methods = [build_method(setting) for setting in settings]
    parts = [part for method in methods for part in _parts(method)]
    groups = {part.groups for part in parts if isinstance(part, Grouped)}
    return Aim(
        _agreed({method.traits.aim for method in methods} - {None}),
        _agreed({count for count in groups if isinstance(count, int)}),
    )


def _agreed(found: set[Any]) -> Any:
    return found.pop() if len(found) == 1 else None


def _parts(value: Any) -> Iterator[Any]:
    """A method or potential, and everything that it consists of."""
    if isinstance(value, tuple):
        for item in value:
            yield from _parts(item)
    elif is_dataclass(value):
        yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
