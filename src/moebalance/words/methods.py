"""Words people type become methods: `phi`, `loss-free`, `phi+loss-free` and their options.

A method's word derives from its class (`GlobalBatchLoss` → `global-batch`), its options are the
class's own fields, and `a+b` composes. Any method that charges can be steered to a goal, `target=`,
or follow a `schedule=`; `proportions=` gives each expert its part of
the load, for the method and its goal.
Nothing is registered: a new class is found because it is exported.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moebalance import methods as methods
from moebalance.methods import MaxVio, Method, Scheduled, Targeted, Together
from moebalance.methods.goals import GOALS, Goal
from moebalance.potentials import NegativeEntropy
from moebalance.words.potentials import build_potential, table_with_proportions
from moebalance.words.suggest import did_you_mean

TARGET, SCHEDULE = "target", "schedule"
"""The options that any method with a strength has besides its own; it takes one of them."""

PROPORTIONS, POTENTIAL = "proportions", "potential"
"""Shares are a field of some methods, and go into the potential of the others."""

Options = Mapping[str, Mapping[str, Any]]


def word(kind: type[Method]) -> str:
    """The word for a method's class.

    >>> word(methods.GlobalBatchLoss), word(methods.NoBalancing), word(methods.ZLoss)
    ('global-batch', 'none', 'z-loss')
    """
    parts = [part.lower() for part in re.findall(r"[A-Z]{3,}|[A-Z][a-z]*", kind.__name__)]
    if parts[-1] in ("balancing", "loss") and len("".join(parts[:-1])) > 1:
        parts.pop()
    return "none" if parts == ["no"] else "-".join(parts)


def method_classes() -> dict[str, type[Method]]:
    """Every method by its word."""
    exported = (getattr(methods, name) for name in methods.__all__)
    kinds = [
        kind
        for kind in exported
        if isinstance(kind, type) and issubclass(kind, Method)
        if kind not in (Method, Scheduled, Targeted, Together)
    ]
    return {word(kind): kind for kind in kinds}


def build_method(name: str, options: Options | None = None) -> Method:
    """Make the method that `name` says.

    Args:
        name: words joined by `+`, each with options of its own in brackets if need be:
            `phi(strength=0.01)+loss-free`.
        options: fields by word, for example a recipe's `[methods.phi]`; brackets go before them.

    Raises:
        ValueError: an unknown word or option, with the nearest one that exists.

    >>> made = build_method("phi(rate=0.5)+loss-free", {"phi": {"strength": 0.01, "rate": 0.1}})
    >>> made.methods[0].rate
    0.5
    """
    options = options or {}
    parts = []
    for part in split_outside_brackets(name, "+"):
        kind, own = _parse(part)
        parts.append(_build_one(kind, {**options.get(kind, {}), **own}))
    return parts[0] if len(parts) == 1 else Together(*parts)


def without_options(name: str) -> str:
    """The words of a method alone.

    >>> without_options("phi(strength=0.01)+loss-free")
    'phi+loss-free'
    """
    return "+".join(_parse(part)[0] for part in split_outside_brackets(name, "+"))


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split at separators that no bracket encloses.

    >>> split_outside_brackets("phi(strength=0.1,rate=0.3),none", ",")
    ['phi(strength=0.1,rate=0.3)', 'none']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _parse(part: str) -> tuple[str, dict[str, Any]]:
    """`phi(strength=0.1)` → `("phi", {"strength": 0.1})`."""
    kind, bracket, rest = part.partition("(")
    if not bracket:
        return kind, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(k.arg for k in call.keywords):
            raise ValueError("options are written name=value")
        own = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"Cannot read method {part!r} ({error}): write it like phi(strength=0.01, rate=0.3)."
        ) from error
    return kind.strip(), own


def _build_one(name: str, options: Mapping[str, Any]) -> Method:
    kinds = method_classes()
    if name not in kinds:
        raise ValueError(
            f"Unknown method {name!r}.{did_you_mean(name, kinds)} Possible: {', '.join(kinds)}, "
            "and combinations such as phi+loss-free."
        )
    kind = kinds[name]
    own = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    possible = own if POTENTIAL not in own else [*own, PROPORTIONS]
    if "strength" in own:
        possible = [*possible, TARGET, SCHEDULE]
    for key in options:
        if key not in (*possible, TARGET, SCHEDULE):  # which say themselves whom they do not fit
            raise ValueError(
                f"Method {name!r} has no option {key!r}.{did_you_mean(key, possible)} "
                f"Possible: {', '.join(possible) or 'none'}."
            )
    values = table_with_proportions(
        {key: value for key, value in options.items() if key not in (TARGET, SCHEDULE)}
    )
    if POTENTIAL in values:
        values[POTENTIAL] = build_potential(values[POTENTIAL])
    if PROPORTIONS not in own and (proportions := values.pop(PROPORTIONS, None)) is not None:
        values[POTENTIAL] = values.get(POTENTIAL, NegativeEntropy()).relative_to(proportions)
    method = kind(**values)
    if TARGET in options and SCHEDULE in options:
        raise ValueError(
            f"Method {name!r} has a target, which moves the strength, and a schedule, which sets "
            "it: give one of them."
        )
    if TARGET in options:
        return Targeted(method, _build_goal(options[TARGET]))
    return _scheduled(method, options[SCHEDULE]) if SCHEDULE in options else method


def _scheduled(method: Method, value: Any) -> Method:
    """A table such as `{warmup_tokens = 20_000, relax_after = 300_000, floor = 0.1}`."""
    possible = [field.name for field in fields(Scheduled) if field.name != "method_repr"]
    if not isinstance(value, Mapping):
        raise ValueError(
            f"schedule={value!r}: must be a table, for example {{warmup_tokens = 20_000}}. "
            f"Possible: {', '.join(possible)}."
        )
    for key in value:
        if key not in possible:
            raise ValueError(
                f"A schedule has no option {key!r}.{did_you_mean(key, possible)} "
                f"Possible: {', '.join(possible)}."
            )
    return Scheduled(method, **value)


def _build_goal(value: Any) -> Goal:
    """`0.3` is a MaxVio; else a table such as `{name = "Gini", at_most = 0.1, load = "soft"}`."""
    if not isinstance(value, Mapping):
        return MaxVio(value)
    table = table_with_proportions(value)
    name = table.pop("name", "MaxVio")
    kinds = {kind.__name__: kind for kind in GOALS}
    if name not in kinds:
        raise ValueError(
            f"Unknown goal {name!r}.{did_you_mean(str(name), kinds)} Possible: {', '.join(kinds)}."
        )
    possible = [field.name for field in fields(kinds[name])]
    for key in table:
        if key not in possible:
            raise ValueError(
                f"Goal {name} has no option {key!r}.{did_you_mean(key, possible)} "
                f"Possible: {', '.join(possible)}."
            )
    if "at_most" not in table:
        raise ValueError(
            f'Goal {name} needs at_most, for example {{name = "{name}", at_most = 0.3}}.'
        )
    goal: Goal = kinds[name](**table)
    return goal
