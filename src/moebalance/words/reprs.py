"""From what `repr` shows of a method back to the method. Nothing in it is evaluated."""

import ast
from typing import Any

from moebalance import methods, potentials
from moebalance.methods import Method
from moebalance.methods.goals import GOALS

_ERRORS = (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError)


def method_of(text: str) -> Method | None:
    """The method of which this is the `repr`; None if it is none of this library's.

    Only the library's own methods, goals and potentials are made, from plain values.

    >>> method_of("Together(PhiBalancing(strength=0.1, rate=0.5), LossFree())").methods[0].rate
    0.5
    >>> method_of("__import__('os').system('true')")
    """
    kinds = {kind.__name__: kind for kind in (*_exported(methods), *_exported(potentials), *GOALS)}
    try:
        found = _made(ast.parse(text, mode="eval").body, kinds)
    except _ERRORS:
        return None
    return found if isinstance(found, Method) else None


def _exported(package: Any) -> list[type]:
    named = (getattr(package, name) for name in package.__all__)
    return [value for value in named if isinstance(value, type)]


def _made(node: ast.expr, kinds: dict[str, type]) -> Any:
    if isinstance(node, ast.Tuple):
        return tuple(_made(part, kinds) for part in node.elts)
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if not isinstance(node.func, ast.Name) or node.func.id not in kinds:
        raise ValueError(f"{ast.unparse(node.func)} is not of this library")
    given = {str(keyword.arg): _made(keyword.value, kinds) for keyword in node.keywords}
    return kinds[node.func.id](*(_made(value, kinds) for value in node.args), **given)
