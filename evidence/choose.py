"""The setting of a method that is reported, and the grid that the loss methods fill.

The rule for a setting: of the settings of a method whose loss lies within 0.01 nats of the method's
lowest, take the one with the lowest MaxVio. It is applied to seeds that no report uses. Each method
gets the balance that costs it no loss that two seeds could tell from noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from evidence.study import Study, family
from moebalance.potentials import Euclidean
from moebalance.words.methods import build_method

TOLERANCE = 0.01
"""Nats per token."""


@dataclass(frozen=True, order=True)
class Cell:
    """A cell of the grid that the methods with a price in the loss fill."""

    load: Literal["hard", "soft"]
    memory: Literal["batch", "step", "EMA"]
    potential: Literal["linear", "log"]

    def __str__(self) -> str:
        return f"{self.load} · {self.memory} · {self.potential}"


def cell(setting: str) -> Cell | None:
    """The grid cell of a method, or None for one outside the grid, such as a method by sequence.

    A method that lets you choose no load and no potential has a price linear in the hard load. A
    method with a rate has a moving average; any other remembers what its gradient couples.

    >>> cell("phi(strength=0.003)"), cell("loss-free")
    (Cell(load='soft', memory='EMA', potential='log'), None)
    >>> print(cell("switch(strength=0.1)"), cell("plug-in(window='step')"), sep="; ")
    hard · batch · linear; soft · step · log
    """
    method: Any = build_method(setting)
    if not hasattr(method, "strength"):
        return None
    memory: Any = "EMA" if hasattr(method, "rate") else method.traits.coupling
    if memory not in ("batch", "step", "EMA"):
        return None
    linear = isinstance(getattr(method, "potential", Euclidean()), Euclidean)
    return Cell(getattr(method, "load", "hard"), memory, "linear" if linear else "log")


def choose(sweep: Study) -> dict[str, str]:
    """The setting of each method that the rule takes, by family."""
    settings: dict[str, list[str]] = {}
    for setting in sweep.settings():
        settings.setdefault(family(setting), []).append(setting)
    chosen = {}
    for name, rivals in settings.items():
        loss = {setting: sweep.mean(setting, "loss") for setting in rivals}
        known = [setting for setting in rivals if math.isfinite(loss[setting])]
        lowest = min(loss[setting] for setting in known)
        near = [setting for setting in known if loss[setting] <= lowest + TOLERANCE]
        chosen[name] = min(near, key=lambda setting: sweep.mean(setting, "maxvio"))
    return chosen
