"""Which setting of a method is reported: chosen by a written rule, on seeds that no report uses.

Of a method's settings, those whose loss lies within 0.01 nats of the method's lowest are taken, and
of them the one with the lowest MaxVio. A method so gets the most balance that costs it nothing that
two seeds could tell.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from evidence.results import Study
from moebalance.methods import EmaSwitchLoss, GlobalBatchLoss, PhiBalancing, PlugInLoss, SwitchLoss
from moebalance.potentials import Euclidean
from moebalance.words.methods import build_method

TOLERANCE = 0.01
"""Nats per token."""


@dataclass(frozen=True)
class Cell:
    """A cell of the grid that the loss-lever methods fill."""

    load: Literal["hard", "soft"]
    memory: Literal["batch", "step", "EMA"]
    potential: Literal["linear", "log"]

    def __str__(self) -> str:
        return f"{self.load} · {self.memory} · {self.potential}"


NAMES = {
    Cell("hard", "batch", "linear"): "Switch",
    Cell("hard", "step", "linear"): "global-batch",
    Cell("hard", "EMA", "linear"): "EMA-Switch",
    Cell("soft", "EMA", "linear"): "φ, Euclidean",
    Cell("soft", "EMA", "log"): "φ, negative entropy",
    Cell("hard", "EMA", "log"): "φ on hard loads",
}


def cell(setting: str) -> Cell | None:
    """The grid cell of a method; None for one that is no part of the grid.

    >>> cell("phi(strength=0.003)"), cell("loss-free")
    (Cell(load='soft', memory='EMA', potential='log'), None)
    """
    method = build_method(setting)
    match method:
        case SwitchLoss():
            return Cell("hard", "batch", "linear")
        case GlobalBatchLoss():
            return Cell("hard", "step", "linear")
        case EmaSwitchLoss():
            return Cell("hard", "EMA", "linear")
        case PhiBalancing():
            return Cell(method.load, "EMA", _kind(method))
        case PlugInLoss():
            return Cell(method.load, method.window, _kind(method))
    return None


def family(setting: str) -> str:
    """A method without the number that says how strongly it acts.

    >>> family("phi(load='hard', strength=0.01)"), family("loss-free(speed=0.001)")
    ("phi(load='hard')", 'loss-free')
    >>> family("phi(strength=0.001)+loss-free"), family("ema-switch(strength=0.1, rate=0.1)")
    ('phi+loss-free', 'ema-switch(rate=0.1)')
    """
    number = "rate" if setting.startswith("loss-free") else "strength"
    bare = re.sub(rf"(, )?{number}=[0-9.e-]+", "", setting)
    return bare.replace("(, ", "(").replace("()", "")


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


def _kind(method: PhiBalancing | PlugInLoss) -> Literal["linear", "log"]:
    return "linear" if isinstance(method.potential, Euclidean) else "log"
