"""What the method of a run is made of, as its header says.

A header's `parts` come from `moebalance.methods.describe`. A log written before there were any has
the method's `repr` alone: it gives classes and settings, and leaves open what a part does.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moebalance.report.methods import word_of
from moebalance.runlog import Run


@dataclass(frozen=True)
class Part:
    """One method of a composition.

    Attributes:
        kind: the name of its class.
        settings: its fields that are plain values, the others as text.
        charges: whether it balances by a price in the loss; None if the log does not say.
        selects: whether it changes which experts are chosen; None if the log does not say.
        wraps: whether it steers the part after it.
    """

    kind: str
    settings: Mapping[str, Any]
    charges: bool | None = None
    selects: bool | None = None
    wraps: bool = False

    @property
    def word(self) -> str:
        """The word that people type for it."""
        return word_of(self.kind)

    def number(self, name: str) -> float | None:
        """A setting that is a finite number, or None."""
        value = self.settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if math.isfinite(value) else None

    def rate(self, tokens: float) -> float | None:
        """Weight of the newest step in its average, for so many tokens a step; None without."""
        memory = self.number("memory_tokens")
        return -math.expm1(-tokens / memory) if memory else self.number("rate")


def parts_of(run: Run) -> tuple[Part, ...]:
    """The parts of a run's method, a wrapper before what it wraps; none where nothing is known."""
    logged: Any = run.header.get("parts")
    return tuple(_logged(logged)) if _readable(logged) else parse(run.method_repr)


def balances(parts: Sequence[Part]) -> bool | None:
    """Whether any part puts pressure on the load; None if the log does not say."""
    known = [value for part in parts for value in (part.charges, part.selects)]
    return True if True in known else None if None in known or not known else False


def parse(method_repr: str) -> tuple[Part, ...]:
    """The parts in a `repr`; it is read as a call, and nothing in it is evaluated.

    >>> [part.kind for part in parse("Together(PhiBalancing(rate=0.1), LossFree())")]
    ['PhiBalancing', 'LossFree']
    """
    try:
        body = ast.parse(method_repr, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    return tuple(_called(body))


_INNER = "method"
"""The field of wrappers that holds a method; a composition holds its methods without names."""


def _called(node: ast.expr) -> Iterator[Part]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return
    given = {str(keyword.arg): keyword.value for keyword in node.keywords}
    held = [*node.args, *([given.pop(_INNER)] if _INNER in given else [])]
    inner = [part for value in held for part in _called(value)]
    settings = {
        name: value.value if isinstance(value, ast.Constant) else ast.unparse(value)
        for name, value in given.items()
    }
    if settings or not inner:
        yield Part(node.func.id, settings, wraps=bool(inner))
    yield from inner


def _readable(logged: Any) -> bool:
    return (
        isinstance(logged, list)
        and bool(logged)
        and all(
            isinstance(part, Mapping)
            and isinstance(part.get("kind"), str)
            and isinstance(part.get("settings"), Mapping)
            and (not part.get("inner") or _readable(part["inner"]))
            for part in logged
        )
    )


def _logged(parts: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    for part in parts:
        known = {
            key: value for key in ("charges", "selects") if type(value := part.get(key)) is bool
        }
        inner = part.get("inner") or []
        yield Part(part["kind"], part["settings"], **known, wraps=bool(inner))
        yield from _logged(inner)
