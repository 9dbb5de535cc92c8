"""How each method looks on the page: its name, its colour and its mark, the same everywhere.

The colours come from a search for the largest smallest OKLab distance between any two of them
under normal, deuteranopic and protanopic sight, with a contrast of at least 3:1 on the page. The
mark's shape says the same once more, so that no figure depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """A method's name on the page, its colour on light and on dark, and its mark's shape."""

    name: str
    light: str
    dark: str
    marker: str


# The order is the order of rows: the subject first, then its rivals, the baseline last.
LOOKS = {
    "phi": Look("φ-balancing", "#f2465f", "#e0731a", "circle"),
    "phi+loss-free": Look("φ + loss-free", "#8e5188", "#c4476c", "star"),
    "switch": Look("Switch loss", "#414fcb", "#4d72aa", "square"),
    "global-batch": Look("Global-batch loss", "#4586de", "#9ed9ff", "diamond"),
    "sequence": Look("Sequence loss", "#151e9d", "#7e6cf7", "up"),
    "ema-switch": Look("EMA-Switch loss", "#32a1a1", "#63cbae", "down"),
    "plug-in": Look("Plug-in loss", "#a3520b", "#f0a870", "pentagon"),
    "loss-free": Look("Loss-free bias", "#316613", "#b4e655", "plus"),
    "quantile": Look("Quantile balancing", "#708a04", "#d4a142", "hexagon"),
    "sinkhorn": Look("Sinkhorn", "#4a1401", "#feebc8", "left"),
    "z-loss": Look("Router z-loss", "#3e0358", "#be91f7", "right"),
    "none": Look("No balancing", "#39444c", "#90929f", "cross"),
}
# Methods that put no pressure on the load: never counted as "balanced".
UNBALANCED = frozenset({"none", "z-loss"})

_SPARE = (
    ("#0c6b57", "#8fd6c8", "square"),
    ("#a8326e", "#ef9fc6", "diamond"),
    ("#5c5c00", "#d8d873", "up"),
)


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """The look of every method named, in page order; methods unknown here get spare colours.

    >>> [look.name for look in looks(["none", "mine", "phi"]).values()]
    ['φ-balancing', 'No balancing', 'mine']
    """
    names = set(methods)
    found = {method: look for method, look in LOOKS.items() if method in names}
    for i, method in enumerate(sorted(names - LOOKS.keys())):
        found[method] = Look(method, *_SPARE[i % len(_SPARE)])
    return found


def display_name(method: str) -> str:
    """The method's name in words; an unknown key is its own name.

    >>> display_name("loss-free"), display_name("mine")
    ('Loss-free bias', 'mine')
    """
    return LOOKS[method].name if method in LOOKS else method
