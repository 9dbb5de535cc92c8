"""A Matplotlib figure as SVG for the page: its theme's colours, its fonts, and names to point at.

What Matplotlib writes stands alone: fixed colours, shapes used by reference, a style for every
element. The page wants none of it, but colours that follow light and dark, text in its own font,
and marks and lines that its script can find.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D

from moebalance.metrics.image import DEAD_SHADE, SHADES
from moebalance.report.canvas import GRID, GROUND, INK, MARKS, MUTED, svg_text
from moebalance.report.estimates import MethodSummary

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
THEME = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    GROUND: "var(--paper)",
    DEAD_SHADE: "var(--dead)",
    **{colour: f"var(--h{i})" for i, colour in enumerate(SHADES)},
}
"""Matplotlib's colours, and the page's variables for them."""
_OF_TEXT = ("fill", "text-anchor", "font-weight")
_RECTANGLE = re.compile(r"M (\S+) (\S+) L (\S+) \2 L \3 (\S+) L \1 \4 (?:L \1 \2 )?z ?")
Say = Mapping[str, str | Sequence[str]]
"""What an artist says when it is pointed at, by its id; a list for a collection of marks."""


def picture(
    figure: Figure,
    label: str,
    *,
    css: str = "",
    methods: Sequence[MethodSummary] = (),
    paint: Mapping[str, str] | None = None,
    say: Say | None = None,
    scales: Axes | None = None,
) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: drawn at 72 dots an inch, so that one unit is one pixel.
        label: what a screen reader says of it.
        css: its class.
        methods: whose marks and lines are in it, for `data-method` and `data-label`.
        paint: CSS colours for Matplotlib's; None leaves them as they are.
        say: what artists say when they are pointed at.
        scales: axes to write down as `data-x` and `data-y`, from which the script reads values.
    """
    root = ET.fromstring(svg_text(figure))
    shapes = {node.get("id", ""): node for node in root.iter(f"{_SVG}path")}
    by_key = {m.key: m for m in methods}
    svg = ET.Element("svg", {"viewBox": root.get("viewBox", ""), "role": "img"})
    svg.set("aria-label", label)
    if css:
        svg.set("class", css)
    if scales is not None:
        svg.attrib |= {"tabindex": "0", **_axes(scales)}
    for node in root:
        svg.extend(_kept(node, shapes, by_key, say or {}))
    text = ET.tostring(svg, encoding="unicode")
    for colour, name in (paint or {}).items():
        text = text.replace(colour, name)
    return text


def shape_of(marker: str) -> str:
    """A mark as the data of an SVG path, about 13 pixels wide, centred on the origin."""
    style = MarkerStyle(MARKS[marker])
    path = style.get_path().transformed(style.get_transform() + Affine2D().scale(11, -11))
    letters = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    return "".join(
        letters[int(code)] + ("" if code == 79 else " ".join(f"{x:.1f}" for x in points))
        for points, code in path.iter_segments()
    )


def _kept(
    node: ET.Element,
    shapes: Mapping[str, ET.Element],
    methods: Mapping[str, MethodSummary],
    say: Say,
) -> Iterator[ET.Element]:
    """The node as the page has it: nothing, itself, or the parts of a group that says nothing."""
    tag = node.tag.removeprefix(_SVG)
    if tag in ("defs", "metadata", "style"):
        return
    if tag != "g":
        leaf = _leaf(tag, node, shapes)
        if leaf.get("style") != "fill:none":  # backgrounds that are not there
            yield leaf
        return
    inside = [part for child in node for part in _kept(child, shapes, methods, say)]
    kind, _, key = node.get("id", "").partition(":")
    group = ET.Element("g")
    if key in methods:
        group.attrib |= {"class": "series", "data-method": key, "data-label": methods[key].label}
        for leaf in inside:
            if leaf.tag != "g":
                leaf.set("class", kind)
    elif kind[:6] in ("xtick_", "ytick_"):
        group.set("class", f"tick {kind[0]}")
    words = say.get(node.get("id", ""))
    if isinstance(words, str):
        ET.SubElement(group, "title").text = words
    elif words is not None:
        for leaf, own in zip(inside, words, strict=True):
            leaf.set("class", kind)
            ET.SubElement(leaf, "title").text = own
    group.extend(inside)
    if group.attrib or words is not None:
        yield group
    else:
        yield from inside


def _leaf(tag: str, node: ET.Element, shapes: Mapping[str, ET.Element]) -> ET.Element:
    """A path or a text; a shape used by reference becomes a path at its place."""
    style, place = _style(node), {k: _short(node.get(k, "0")) for k in ("x", "y")}
    if tag == "text":
        found = ET.Element("text", place)
        found.text = node.text
        style = {key: value for key, value in style.items() if key in _OF_TEXT}
    else:
        source = shapes[node.get(_LINK, "#")[1:]] if tag == "use" else node
        data = _short(" ".join(source.get("d", "").split()))
        # Rectangles, of which maps have thousands, in less than half the letters.
        found = ET.Element("path", {"d": _RECTANGLE.sub(r"M\1 \2H\3V\4H\1z", data)})
        if tag == "use":
            found.set("transform", f"translate({place['x']} {place['y']})")
            style = _style(source) | style
    if style:
        found.set("style", ";".join(f"{key}:{value}" for key, value in style.items()))
    return found


def _style(node: ET.Element) -> dict[str, str]:
    parts = (part.split(": ", 1) for part in node.get("style", "").split("; ") if ": " in part)
    return dict(parts)


def _short(numbers: str) -> str:
    """The same with at most two decimals.

    >>> _short("M 1.23456 20 L 3.0001 4")
    'M 1.23 20 L 3 4'
    """
    return re.sub(
        r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), numbers
    )


def _axes(axes: Axes) -> dict[str, str]:
    """The axes as attributes: lowest and highest value, their pixels, and whether logarithmic."""
    box, height = axes.bbox, axes.figure.bbox.height
    found = {}
    for name, limits, ends, scale in (
        ("x", axes.get_xlim(), (box.x0, box.x1), axes.get_xscale()),
        ("y", axes.get_ylim(), (height - box.y0, height - box.y1), axes.get_yscale()),
    ):
        log = " log" if scale == "log" else ""
        found[f"data-{name}"] = f"{limits[0]!s} {limits[1]!s} {ends[0]:.2f} {ends[1]:.2f}{log}"
    return found
