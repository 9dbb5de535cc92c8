"""How each method looks: its name, its colours, its mark and its line, the same everywhere.

The colours of the methods listed here come from a search for the largest smallest OKLab distance
between any two of them under normal, deuteranopic and protanopic sight, with a contrast of at least
3:1 on the page. The mark's shape says the same once more, so that no figure depends on colour
alone. Any other method gets a look from its word, and every further setting of a method gets a
shade of its colour with another mark and another line.
"""

from __future__ import annotations

import colorsys
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

PAPER = ("#fdfdfc", "#15171a")
"""The page's background, light and dark."""
MARKERS = (
    *("circle", "square", "diamond", "up", "down", "left"),
    *("right", "plus", "cross", "hexagon", "pentagon", "star"),
)
LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Look:
    """Name, colour on a light and on a dark page, shape of the mark, style of the line."""

    name: str
    light: str
    dark: str
    marker: str
    line: str = "-"


LEADERS = ("phi+loss-free", "phi+smebu", "phi")
"""The recommended method, φ with another price on the choice, and φ-balancing alone."""

# The order is the order of rows: the leaders first, then their rivals, the baseline last.
LOOKS = {
    "phi+loss-free": Look("φ + loss-free", "#8e5188", "#c4476c", "hexagon"),
    "phi+smebu": Look("φ + SMEBU", "#b57bb0", "#e58aa5", "star"),
    "phi": Look("φ-balancing", "#f2465f", "#e0731a", "circle"),
    "switch": Look("Switch loss", "#414fcb", "#4d72aa", "square"),
    "global-batch": Look("Global-batch loss", "#4586de", "#9ed9ff", "diamond"),
    "sequence": Look("Sequence loss", "#151e9d", "#7e6cf7", "up"),
    "ema-switch": Look("EMA-Switch loss", "#32a1a1", "#63cbae", "down"),
    "plug-in": Look("Plug-in loss", "#a3520b", "#f0a870", "pentagon"),
    "loss-free": Look("Loss-free bias", "#316613", "#b4e655", "plus"),
    "smebu": Look("SMEBU", "#1d7da5", "#74c5e7", "right"),
    "quantile": Look("Quantile balancing", "#708a04", "#d4a142", "hexagon"),
    "sinkhorn": Look("Sinkhorn", "#4a1401", "#feebc8", "left"),
    "z-loss": Look("Router z-loss", "#3e0358", "#be91f7", "right"),
    "none": Look("No balancing", "#39444c", "#90929f", "cross", "--"),
}


def look(method: str, setting: int = 0) -> Look:
    """The look of a method, by its word; `setting` counts the settings of it that are compared."""
    first = LOOKS.get(method) or _from_word(method)
    if not setting:
        return first
    at = MARKERS.index(first.marker) + 5 * setting  # 5 and 12: all marks before the first again
    return replace(
        first,
        light=_shade(first.light, (0.25, 0.4, 0.16)[setting % 3], PAPER[0]),
        dark=_shade(first.dark, (0.85, 0.6, 0.73)[setting % 3], PAPER[1]),
        marker=MARKERS[at % len(MARKERS)],
        line=LINES[(LINES.index(first.line) + setting) % len(LINES)],
    )


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """The look of every method named, in page order: the listed ones first.

    >>> [look.name for look in looks(["none", "top-any", "phi"]).values()]
    ['φ-balancing', 'No balancing', 'Top any']
    """
    names = set(methods)
    order = [*(m for m in LOOKS if m in names), *sorted(names - LOOKS.keys())]
    return {method: look(method) for method in order}


def display_name(method: str) -> str:
    """The method's name in words.

    >>> display_name("loss-free"), display_name("top-any"), display_name("phi+z-loss")
    ('Loss-free bias', 'Top any', 'φ-balancing + Router z-loss')
    """
    return look(method).name


def word_of(kind: str) -> str:
    """The word for the name of a method's class.

    >>> word_of("GlobalBatchLoss"), word_of("NoBalancing"), word_of("SMEBU"), word_of("ZLoss")
    ('global-batch', 'none', 'smebu', 'z-loss')
    """
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", kind)
    words = [part.lower() for part in parts] or [kind]
    if words[-1] in ("balancing", "loss") and len("".join(words[:-1])) > 1:
        words.pop()
    return "none" if words == ["no"] else "-".join(words)


def _from_word(method: str) -> Look:
    """A look that follows from the word alone, and so is the same in every report."""
    number = zlib.crc32(method.encode())
    colour = "#" + "".join(
        f"{round(255 * x):02x}" for x in colorsys.hls_to_rgb(number % 997 / 997, 0.5, 0.7)
    )
    light, dark = _shade(colour, 0.38, PAPER[0]), _shade(colour, 0.68, PAPER[1])
    return Look(_words(method), light, dark, MARKERS[number // 997 % len(MARKERS)])


def _words(method: str) -> str:
    """The name of a method that is not listed; what is no word is left as it is."""
    if "+" in method:
        return " + ".join(display_name(part) for part in method.split("+"))
    plain = re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", method)
    return method.replace("-", " ").capitalize() if plain else method


def _shade(colour: str, lightness: float, paper: str) -> str:
    """The colour at another lightness, with a contrast of at least 3:1 on the paper."""
    hue, _, saturation = colorsys.rgb_to_hls(*_channels(colour))
    step = -0.02 if _luminance(paper) > 0.5 else 0.02
    while True:
        rgb = colorsys.hls_to_rgb(hue, lightness, saturation)
        found = "#" + "".join(f"{round(255 * x):02x}" for x in rgb)
        ends = sorted((_luminance(found), _luminance(paper)))
        if (ends[1] + 0.05) / (ends[0] + 0.05) >= 3:
            return found
        lightness += step


def _channels(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _luminance(colour: str) -> float:
    """Relative luminance, as contrast is defined by WCAG 2."""
    linear = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour)
    )
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def leader(methods: Iterable[str]) -> str | None:
    """The method that a report puts first: the recommended one, else φ-balancing, else none.

    >>> leader(["none", "phi", "phi+loss-free"]), leader(["none", "switch"])
    ('phi+loss-free', None)
    """
    there = set(methods)
    return next((word for word in LEADERS if word in there), None)
