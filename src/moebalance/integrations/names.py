"""Which of a model's routers to balance, as users say it."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

Layers = str | Sequence[str] | Callable[[str], bool]
"""A glob pattern, several of them, or a test, over the names of routers."""


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
