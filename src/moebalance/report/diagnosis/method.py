"""A logged method, read back from its `repr`: what it is made of and with which settings.

A log holds `Together(PhiBalancing(potential=NegativeEntropy(), strength=0.01, rate=0.1), …)`;
the parts are read as Python reads a call, and nothing is evaluated.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_CHARGING = {
    "PhiBalancing",
    "SwitchLoss",
    "GlobalBatchLoss",
    "SequenceLoss",
    "PlugInLoss",
    "EmaSwitchLoss",
}
_SELECTING = {"LossFree", "QuantileBalancing"}
_INNER = {"method"}  # what Together, Targeted and Scheduled hold


@dataclass(frozen=True)
class Part:
    """One method of a composition, by its class and those of its settings that are plain values."""

    kind: str
    settings: Mapping[str, Any]

    def number(self, name: str) -> float | None:
        """A setting that is a number, or None."""
        value = self.settings.get(name)
        return float(value) if isinstance(value, int | float) else None

    @property
    def charges(self) -> bool:
        """Whether it balances by a price in the loss."""
        return self.kind in _CHARGING

    @property
    def selects(self) -> bool:
        """Whether it balances by a price subtracted before top-k."""
        return self.kind in _SELECTING

    def rate(self, tokens: float) -> float | None:
        """Weight of the newest step in its average, for so many tokens a step; None without."""
        memory = self.number("memory_tokens")
        return self.number("rate") if memory is None else -math.expm1(-tokens / memory)


def parts(method_repr: str) -> tuple[Part, ...]:
    """The parts of a method, outermost first; none where its `repr` cannot be read.

    >>> [part.kind for part in parts("Together(PhiBalancing(rate=0.1), LossFree())")]
    ['Together', 'PhiBalancing', 'LossFree']
    """
    try:
        body = ast.parse(method_repr, mode="eval").body
    except (SyntaxError, ValueError):
        return ()
    return tuple(_parts(body))


def _parts(node: ast.expr) -> Iterator[Part]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return
    settings, inner = {}, list(node.args)
    for keyword in node.keywords:
        if isinstance(keyword.value, ast.Constant):
            settings[str(keyword.arg)] = keyword.value.value
        elif keyword.arg in _INNER:
            inner.append(keyword.value)
    yield Part(node.func.id, settings)
    for value in inner:
        yield from _parts(value)
