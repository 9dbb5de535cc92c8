"""A run log as the rules read it: arrays over steps and layers, and what was set.

Numbers that a log does not have are nan; a rule that needs them says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moebalance.report.estimates import finite
from moebalance.report.loads import layer_names, maxvio
from moebalance.report.parts import Part, balances, parts_of
from moebalance.runlog import Row, Run, column
from moebalance.runlog.columns import Chosen

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """One run, ready for the rules.

    Args:
        run: the run.
        twins: runs of the same recipe, text and batching without balancing.
    """

    run: Run
    twins: tuple[Run, ...] = ()

    @cached_property
    def step(self) -> Array:
        """The steps that have a row, (N,)."""
        return np.array(column(self.run.steps, "step"), dtype=float)

    def series(self, key: str) -> Array:
        """A number of every step row, (N,)."""
        found = (_number({key: value}, key) for value in column(self.run.steps, key))
        return np.fromiter(found, dtype=float, count=len(self.run.steps))

    @cached_property
    def snapshots(self) -> Sequence[Row]:
        """The snapshots that hold loads of one shape."""
        shapes = [_shape(row.get("load")) for row in self.run.snapshots]
        last = next((shape for shape in reversed(shapes) if shape), ())
        return Chosen(self.run.snapshots, [i for i, s in enumerate(shapes) if s and s == last])

    @cached_property
    def load_step(self) -> Array:
        """The steps of the snapshots, (S,)."""
        return np.array(column(self.snapshots, "step"), dtype=float)

    def loads(self, layer: int) -> Array:
        """Hard load of a layer in every snapshot, in even shares, (S, E)."""
        return self._loads[layer]

    @cached_property
    def _loads(self) -> list[Array]:
        """Of each layer, (S, E); a snapshot is looked at once, and not kept."""
        rows = [[np.array(one, dtype=float) for one in row["load"]] for row in self.snapshots]
        return [_even_shares(same) for same in zip(*rows, strict=True)]

    @cached_property
    def layers(self) -> int:
        """How many layers the last load has."""
        return len(self._late("load"))

    @cached_property
    def names(self) -> list[str]:
        """What the layers are called."""
        return layer_names(self.run, self.layers)

    def late_load(self, layer: int, key: str = "load") -> Array:
        """Load of a layer at the end, in even shares, (E,).

        From the last evaluation; without one, the mean of the snapshots of the last third.
        """
        return _even_shares(self._late(key)[layer])

    def late_maxvio(self, key: str = "load") -> list[float]:
        """MaxVio of each layer's load at the end; empty where the log has no such load."""
        return [maxvio(load) for load in self._late(key)]

    @cached_property
    def late_tokens(self) -> float:
        """Tokens that the loads at the end were counted over; nan if not logged."""
        row = self._last_eval
        if row is not None and _is_load(row.get("load")):
            return _number(row, "tokens")
        return float(self.tokens * len(self._late_snapshots))

    @property
    def tokens(self) -> float:
        """Tokens of a step; nan if not logged."""
        found = self.series("tokens")
        return float(np.nanmedian(found)) if np.isfinite(found).any() else math.nan

    @property
    def top_k(self) -> float:
        """Experts of a token; nan if not logged."""
        model = self.run.header.get("model")
        return _number(model, "top_k") if isinstance(model, dict) else math.nan

    def floor(self, tokens: float) -> float:
        """MaxVio that chance alone leaves in so many tokens: √(2 ln E · E / (N K)); nan unknown."""
        top_k = self.top_k
        experts = len(self._late("load")[0]) if self.layers else 0
        if experts < 2 or not tokens > 0 or not top_k > 0:
            return math.nan
        return math.sqrt(2 * math.log(experts) * experts / (tokens * top_k))

    def evaluated(self, key: str) -> list[float]:
        """A number of every evaluation in training that has it."""
        rows = [row for row in self.run.evals if row["step"] > 0]
        return [value for row in rows if (value := finite(row, key)) is not None]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What the method is made of."""
        return parts_of(self.run)

    @property
    def balances(self) -> bool | None:
        """Whether the method puts pressure on the load; None if the log does not say."""
        return False if self.run.method == "none" else balances(self.parts)

    @property
    def charging(self) -> Part | None:
        """The first part that charges in the loss."""
        return next((part for part in self.parts if part.charges and not part.wraps), None)

    @property
    def selecting(self) -> Part | None:
        """The first part that chooses experts."""
        return next((part for part in self.parts if part.selects and not part.wraps), None)

    @property
    def steered(self) -> Part | None:
        """The part that steers another one to a goal."""
        return next((part for part in self.parts if part.wraps and "goal" in part.settings), None)

    @property
    def judged(self) -> bool:
        """Whether there are enough steps for anything about their course."""
        return self.run.last_step >= LEAST_STEPS and len(self.step) >= LEAST_STEPS

    @cached_property
    def _last_eval(self) -> Row | None:
        rows = [row for row in self.run.evals if row["step"] > 0]
        # An evaluation half-way says nothing about the end.
        return rows[-1] if rows and rows[-1]["step"] >= 0.9 * self.run.last_step else None

    @cached_property
    def _late_snapshots(self) -> Sequence[Row]:
        steps = column(self.snapshots, "step")
        late = [i for i, step in enumerate(steps) if step > 2 / 3 * self.run.last_step]
        return Chosen(self.snapshots, late)

    def _late(self, key: str) -> list[Any]:
        if key not in self._kept:
            self._kept[key] = self._load_of_the_end(key)
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[str, list[Any]]:
        return {}

    def _load_of_the_end(self, key: str) -> list[Any]:
        row = self._last_eval
        if row is not None and _is_load(row.get(key)):
            return list(row[key])
        rows = [
            [np.array(layer, dtype=float) for layer in row[key]]
            for row in self._late_snapshots
            if _is_load(row.get(key))
        ]
        layers = zip(*rows, strict=False)
        return [np.mean([x for x in same if len(x) == len(same[-1])], axis=0) for same in layers]


LEAST_STEPS = 100
"""Router and price take tens of steps to answer each other; a trend needs several such times."""


def windows(values: Array, count: int) -> Array:
    """Means over `count` equal windows of a series, without what is missing, (count,)."""
    pieces = np.array_split(values, count)
    return np.array([_mean(piece) for piece in pieces])


def spread(values: Array) -> float:
    """Standard deviation from step to step: of differences, so that a trend does not count."""
    jumps = np.diff(values[np.isfinite(values)])
    if not len(jumps):
        return math.nan
    # 1.4826 · the median of |x| is the deviation of a normal x; rare spikes leave it alone.
    return float(1.4826 * np.median(np.abs(jumps)) / math.sqrt(2))


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _is_load(value: Any) -> bool:
    """Whether this is a list of layers, each a list of finite numbers that add up to something."""
    if not isinstance(value, list) or not value:
        return False
    numbers = (int, float)
    return all(
        isinstance(layer, list)
        and all(type(x) in numbers and 0 <= x < math.inf for x in layer)
        and sum(layer) > 0
        for layer in value
    )


def _shape(value: Any) -> tuple[int, ...]:
    """How many experts each layer of a load has; empty for what is no load."""
    return tuple(map(len, value)) if _is_load(value) else ()


def _even_shares(load: Sequence[Any]) -> Array:
    share = np.asarray(load, dtype=float)
    return np.asarray(share * share.shape[-1] / share.sum(axis=-1, keepdims=True))


def _number(row: Any, key: str) -> float:
    value = finite(row, key)
    return math.nan if value is None else value
