"""Names and tables become potentials, and text becomes proportions.

    Tsallis
    {name = "Tsallis", alpha = 1.2, unit_slope = true}
    {name = "NegativeEntropy", groups = 4, proportions = "8x4, 24x1"}
    [{name = "NegativeEntropy", groups = 4}, {name = "NegativeEntropy", weight = 0.1}]

A list adds up. In one table the potential is first rescaled, then grouped, then made relative to
the proportions of the experts; `weight` comes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import reduce
from operator import add
from typing import Any

from moebalance.potentials import POTENTIALS, Potential
from moebalance.proportions import Proportions, as_proportions
from moebalance.words.suggest import check_options, instead_of

_MOST_EXPERTS = 2**20  # no layer has more; each of them takes memory
_AROUND = ("unit_slope", "groups", "proportions", "weight")


def build_potential(value: Any) -> Potential:
    """A potential from its name, a table, or a list of them to add up.

    Raises:
        ValueError: an unknown name or option, with the nearest one that exists.

    >>> build_potential([{"name": "Euclidean", "groups": 2}, {"name": "Euclidean", "weight": 0.5}])
    ... # doctest: +NORMALIZE_WHITESPACE
    Combined(parts=(Grouped(potential=Euclidean(), groups=2), Euclidean()), weights=(1.0, 0.5))
    """
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("A list of potentials is added up: give one or more.")
        return reduce(add, map(build_potential, value))
    table = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = table.pop("name", None)
    around = {key: table.pop(key, None) for key in _AROUND}
    kinds = {kind.__name__: kind for kind in POTENTIALS}
    if name not in kinds:
        raise ValueError(f"Unknown potential {name!r}.{instead_of(str(name), kinds)}")
    own = [field.name for field in fields(kinds[name])]  # type: ignore[arg-type]
    check_options(f"Potential {name}", table, [*own, *_AROUND])
    return _composed(kinds[name](**table), **around)


def _composed(
    potential: Potential, unit_slope: Any, groups: Any, proportions: Any, weight: Any
) -> Potential:
    if unit_slope:
        potential = potential.unit_slope()
    if groups is not None:
        potential = potential.grouped(groups)
    if proportions is not None:
        potential = potential.relative_to(read_proportions(proportions))
    return potential if weight is None else weight * potential


def read_proportions(value: Any) -> Proportions:
    """Proportions of experts: a list of numbers, or text in which `8x4` is eight experts of 4.

    Raises:
        TypeError, ValueError: neither of them, or a number that is no proportion.

    >>> read_proportions("2x4, 3x1")
    (4.0, 4.0, 1.0, 1.0, 1.0)
    """
    if not isinstance(value, str):
        return as_proportions(value)
    found: list[float] = []
    for part in value.split(","):
        count, times, share = part.partition("x")
        try:
            found += [float(share)] * _experts(count) if times else [float(count)]
        except ValueError as error:
            raise ValueError(
                f"Cannot read proportions {value!r} at {part.strip()!r}: write them like "
                f"'8x4, 24x1', eight experts of 4 and 24 of 1; 1 to {_MOST_EXPERTS:,} experts."
            ) from error
    return as_proportions(found)


def _experts(count: str) -> int:
    if not 1 <= int(count) <= _MOST_EXPERTS:
        raise ValueError(f"{count} experts")
    return int(count)


def table_with_proportions(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a table in which `proportions`, if given, are read."""
    if value.get("proportions") is None:
        return dict(value)
    return {**value, "proportions": read_proportions(value["proportions"])}
