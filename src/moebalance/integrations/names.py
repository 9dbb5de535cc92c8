"""Names of a model's routers: which to balance, as users say it, and without what adapters add."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

Layers = str | Sequence[str] | Callable[[str], bool]
"""A glob pattern, several of them, or a test, over the names of routers."""

_ADAPTER = re.compile(
    r"(^|(?<=\.))base_model\.model\.|\.modules_to_save\.[^.]+|\.base_layer(?=\.|$)"
)


def without_adapters(name: str) -> str:
    """A module's name without what PEFT puts around the model, the module, or what it is in.

    The name is then the same before an adapter, with one of whatever name, and after a merge.

    >>> without_adapters("base_model.model.model.layers.1.mlp.gate.modules_to_save.default")
    'model.layers.1.mlp.gate'
    """
    return _ADAPTER.sub("", name)


def chosen(names: Iterable[str], layers: Layers | None) -> list[str]:
    """The names that `layers` chooses, in their order; all for None.

    Raises:
        ValueError: a pattern, or the test, chooses none.

    >>> chosen(["layers.0.gate", "layers.1.gate"], "layers.1.*")
    ['layers.1.gate']
    >>> chosen(["layers.0.gate", "layers.1.gate"], lambda name: ".0." in name)
    ['layers.0.gate']
    """
    names = list(names)
    if layers is None:
        return names
    if callable(layers):
        found = {name for name in names if layers(name)}
        idle = [] if found else [repr(layers)]
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        matches = {p: {n for n in names if fnmatchcase(n, p)} for p in patterns}
        found = set().union(*matches.values())
        idle = [repr(pattern) for pattern, those in matches.items() if not those]
        idle = idle or ([] if found else ["[]"])
    if idle:
        raise ValueError(
            f"layers={idle[0]} chooses none of the model's {len(names)} routers. Their names are "
            f"like {names[0]!r}. Give a pattern such as '*.layers.[0-3].*', a list of them, or a "
            "function of the name."
        )
    return [name for name in names if name in found]
