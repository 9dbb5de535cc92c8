"""Words become methods: `phi`, `loss-free`, `phi(strength=0.01)+loss-free`.

The word of a method comes from its class (`GlobalBatchLoss` → `global-batch`), its options are the
fields of the class, and `a+b` composes. Nothing is registered: an exported class has a word.

Three options fit several methods. `target=` steers the strength to a goal, `schedule=` makes it
follow the tokens seen, and `proportions=` gives each expert its part of the load.
"""

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from moebalance import methods as methods
from moebalance.methods import MaxVio, Method, Scheduled, Targeted, Together, inner_methods
from moebalance.methods.goals import GOALS, Goal
from moebalance.potentials import POTENTIALS, NegativeEntropy
from moebalance.words.potentials import build_potential, table_with_proportions
from moebalance.words.suggest import check_options, instead_of, nearest

TARGET, SCHEDULE = "target", "schedule"
"""Options of every method with a strength; a method takes one of them."""

PROPORTIONS, POTENTIAL = "proportions", "potential"
"""Proportions are a field of some methods; of the others they go into the potential."""

Options = Mapping[str, Mapping[str, Any]]


def word(kind: type) -> str:
    """The word for a method's class.

    >>> word(methods.GlobalBatchLoss), word(methods.NoBalancing), word(methods.ZLoss)
    ('global-batch', 'none', 'z-loss')
    >>> word(type("SMEBU", (), {})), word(type("SMEBUBalancing", (), {}))
    ('smebu', 'smebu')
    """
    # A run of capitals is one part, but its last letter may begin the next: SMEBU, SMEBU-Balancing.
    parts = [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*", kind.__name__)]
    if parts[-1] in ("balancing", "loss") and len("".join(parts[:-1])) > 1:
        parts.pop()
    return "none" if parts == ["no"] else "-".join(parts)


def words_of(method: Method) -> str:
    """The words for a method, without options; a wrapper is called as what it wraps.

    >>> words_of(methods.Together(methods.PhiBalancing(), methods.LossFree()))
    'phi+loss-free'
    """
    inner = inner_methods(method)
    return "+".join(words_of(each) for each in inner) if inner else word(type(method))


def method_classes() -> dict[str, type[Method]]:
    """Every method by its word; a wrapper has none, as it cannot be made without a method.

    >>> wrappers = {methods.Together, methods.Targeted, methods.Scheduled}
    >>> wrappers & set(method_classes().values())
    set()
    """
    exported = (getattr(methods, name) for name in methods.__all__)
    return {
        word(kind): kind
        for kind in exported
        if isinstance(kind, type) and issubclass(kind, Method) and kind is not Method
        if all(p.default is not p.empty for p in inspect.signature(kind).parameters.values())
    }


def build_method(name: str, options: Options | None = None) -> Method:
    """Make the method that `name` says.

    Args:
        name: words joined by `+`, each with its own options in brackets:
            `phi(strength=0.01)+loss-free`. A name as a value needs no quotes:
            `phi(potential=Tsallis)`.
        options: options by word, for example a recipe's `[methods.phi]`; brackets override them.

    Raises:
        TypeError, ValueError: an unknown word or option, with the nearest one that exists; a value
            that cannot be read or used.

    >>> made = build_method("phi(rate=0.5)+loss-free", {"phi": {"strength": 0.01, "rate": 0.1}})
    >>> made.methods[0].rate
    0.5
    """
    options = options or {}
    check_tables(options)
    parts = []
    for part in split_outside_brackets(name, "+"):
        kind, own = _parse(part)
        parts.append(_build_one(kind, {**options.get(kind, {}), **own}))
    return parts[0] if len(parts) == 1 else Together(*parts)


def check_tables(options: Options) -> None:
    """Refuse a method or an option that does not exist, of methods that are not used, too.

    Raises:
        TypeError, ValueError: with the nearest one that exists.
    """
    for name, own in options.items():
        _check_options(name, _class_of(name), own)


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
        own = {str(k.arg): _value(str(k.arg), k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        problem = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(
            f"Cannot read method {part!r} ({problem}): write it like phi(strength=0.01, rate=0.3)."
        ) from None
    return kind.strip(), own


def _value(key: str, written: ast.expr) -> Any:
    if isinstance(written, ast.Name):  # a name without quotes, or TOML's true and false
        return {"true": True, "false": False}.get(written.id, written.id)
    try:
        return ast.literal_eval(written)
    except ValueError:
        raise ValueError(
            f"{key}={ast.unparse(written)} is not a number, a name, a list or a {{table}}"
        ) from None


def _class_of(name: str) -> type[Method]:
    kinds = method_classes()
    if name not in kinds:
        raise ValueError(
            f"Unknown method {name!r}.{_as_potential(name)}{instead_of(name, sorted(kinds))} "
            "Join several with +, for example phi+loss-free."
        )
    return kinds[name]


def _build_one(name: str, options: Mapping[str, Any]) -> Method:
    kind = _class_of(name)
    _check_options(name, kind, options)
    own = {key: value for key, value in options.items() if key not in (TARGET, SCHEDULE)}
    method = kind(**_fields(kind, own))
    if TARGET in options:
        return Targeted(method, _build_goal(options[TARGET]))
    return _scheduled(method, options[SCHEDULE]) if SCHEDULE in options else method


def _as_potential(name: str) -> str:
    """What to write if the word of a method is the name of a potential, or nearly."""
    near = nearest(name, [potential.__name__ for potential in POTENTIALS])
    return f" The potential {near} is written phi(potential={near})." if near else ""


def _check_options(name: str, kind: type[Method], options: Mapping[str, Any]) -> None:
    own = _field_names(kind)
    possible = own if POTENTIAL not in own else [*own, PROPORTIONS]
    possible = possible if "strength" not in own else [*possible, TARGET, SCHEDULE]
    # A target or a schedule says itself which method it does not fit.
    given = [key for key in options if key not in (TARGET, SCHEDULE)]
    check_options(f"Method {name!r}", given, possible)
    for field in fields(kind):  # type: ignore[arg-type]
        value = options.get(field.name, field.default)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise TypeError(f"{field.name}={value!r}: must be true or false.")
    if TARGET in options and SCHEDULE in options:
        raise ValueError(
            f"Method {name!r} has a target, which moves the strength, and a schedule, which sets "
            "it: give one of them."
        )


def _fields(kind: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a class's fields, with potentials and proportions built."""
    values = table_with_proportions(options)
    if POTENTIAL in values:
        values[POTENTIAL] = build_potential(values[POTENTIAL])
    outside = PROPORTIONS not in _field_names(kind)
    if outside and (proportions := values.pop(PROPORTIONS, None)) is not None:
        values[POTENTIAL] = values.get(POTENTIAL, NegativeEntropy()).relative_to(proportions)
    return values


def _scheduled(method: Method, value: Any) -> Method:
    """A table such as `{warmup_tokens = 20_000, relax_after = 300_000, floor = 0.1}`."""
    possible = [field.name for field in fields(Scheduled) if field.default is not MISSING]
    if not isinstance(value, Mapping):
        raise ValueError(
            f"schedule={value!r}: must be a table, for example {{warmup_tokens = 20_000}}. "
            f"Possible: {', '.join(possible)}."
        )
    check_options("A schedule", value, possible)
    return Scheduled(method, **value)


def _build_goal(value: Any) -> Goal:
    """`0.3` is a MaxVio; else a table such as `{name = "Gini", at_most = 0.1, load = "soft"}`."""
    if isinstance(value, bool | str):
        raise TypeError(
            f"target={value!r}: must be a number, the MaxVio that you want, or a table such as "
            '{name = "Gini", at_most = 0.1}.'
        )
    if not isinstance(value, Mapping):
        return MaxVio(value)
    table = table_with_proportions(value)
    name = str(table.pop("name", "MaxVio"))
    kinds = {kind.__name__: kind for kind in GOALS}
    if name not in kinds:
        raise ValueError(f"Unknown goal {name!r}.{instead_of(name, kinds)}")
    check_options(f"Goal {name}", table, _field_names(kinds[name]))
    if "at_most" not in table:
        raise ValueError(
            f'Goal {name} needs at_most, for example {{name = "{name}", at_most = 0.3}}.'
        )
    goal: Goal = kinds[name](**table)
    return goal


def _field_names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]
