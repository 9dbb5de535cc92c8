"""What a method is made of, as plain data: a run's header holds it, and the report reads it."""

from typing import Any

from moebalance.methods.base import Method, inner_methods
from moebalance.methods.together import Together


def describe(method: Method) -> list[dict[str, Any]]:
    """The parts of a method, in order; a composition gives one entry for each method in it.

    Each entry has five keys:

    - `kind`: the name of the class;
    - `charges`: whether it balances by a price in the loss;
    - `selects`: whether it changes which experts are chosen;
    - `settings`: its fields, numbers and strings as they are, the rest as their `repr`; a field
      that is None was not given and is left out;
    - `inner`: the parts of the method that it wraps, empty for most.

    >>> from moebalance.methods import LossFree, SwitchLoss, Together
    >>> parts = describe(Together(SwitchLoss(strength=0.1), LossFree()))
    >>> [(part["kind"], part["charges"], part["selects"]) for part in parts]
    [('SwitchLoss', True, False), ('LossFree', False, True)]
    >>> parts[0]["settings"]
    {'strength': 0.1}
    """
    inner = [part for held in inner_methods(method) for part in describe(held)]
    if isinstance(method, Together):
        return inner
    traits = method.traits
    plain = {
        name: value if isinstance(value, bool | int | float | str) else repr(value)
        for name, value in vars(method).items()
        if value is not None and not isinstance(value, Method)
    }
    return [
        {
            "kind": type(method).__name__,
            "charges": traits.charges and traits.balances,
            "selects": traits.selects,
            "settings": plain,
            "inner": inner,
        }
    ]
