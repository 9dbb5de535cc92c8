"""Words people type become potentials, and lists of shares.

    Tsallis
    {name = "Tsallis", alpha = 1.2, unit_slope = true}
    {name = "NegativeEntropy", groups = 4, shares = "8x4, 24x1"}
    [{name = "NegativeEntropy", groups = 4}, {name = "NegativeEntropy", weight = 0.1}]

A list adds up. In one table the potential is rescaled first, then grouped, then made relative to
shares, which are always those of experts; `weight` comes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import reduce
from operator import add
from typing import Any

from moebalance import potentials
from moebalance.potentials import POTENTIALS, Potential
from moebalance.proportions import Proportions, as_proportions
from moebalance.words.suggest import did_you_mean

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
    table = {"name": value} if isinstance(value, str) else dict(value)
    name = table.pop("name", None)
    around: dict[str, Any] = {key: table.pop(key, None) for key in _AROUND}
    possible = [kind.__name__ for kind in POTENTIALS]
    if name not in possible:
        raise ValueError(
            f"Unknown potential {name!r}.{did_you_mean(str(name), possible)} "
            f"Possible: {', '.join(possible)}."
        )
    kind = getattr(potentials, name)
    known = [field.name for field in fields(kind)]
    for key in table:
        if key not in known:
            raise ValueError(
                f"Potential {name} has no option {key!r}.{did_you_mean(key, [*known, *_AROUND])} "
                f"Possible: {', '.join([*known, *_AROUND])}."
            )
    potential: Potential = kind(**table)
    if around["unit_slope"]:
        potential = potential.unit_slope()
    if around["groups"] is not None:
        potential = potential.grouped(around["groups"])
    if around["proportions"] is not None:
        potential = potential.relative_to(read_proportions(around["proportions"]))
    return potential if around["weight"] is None else around["weight"] * potential


def read_proportions(value: Any) -> Proportions:
    """Shares of experts: a list of numbers, or text in which `8x4` is eight experts of 4.

    Raises:
        TypeError, ValueError: neither, or a number that is no share.

    >>> read_proportions("2x4, 3x1")
    (4.0, 4.0, 1.0, 1.0, 1.0)
    """
    if not isinstance(value, str):
        return as_proportions(value)
    found: list[float] = []
    for part in value.split(","):
        count, times, share = part.partition("x")
        try:
            found += [float(share)] * int(count) if times else [float(count)]
        except ValueError as error:
            raise ValueError(
                f"Cannot read shares {value!r} at {part.strip()!r}: write them like '8x4, 24x1', "
                "eight experts of 4 and 24 of 1."
            ) from error
    return as_proportions(found)


def table_with_proportions(value: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their `proportions`, if they have some, read."""
    if value.get("proportions") is None:
        return dict(value)
    return {**value, "proportions": read_proportions(value["proportions"])}
