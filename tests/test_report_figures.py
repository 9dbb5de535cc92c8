"""The figures: marks, bars, curves and maps measured back off the axes as a reader would."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from moebalance.report import summarise, write_figure
from moebalance.report.axes import Axis, Ink
from moebalance.report.heatmap import colour_class, load_map
from moebalance.report.labels import Anchor, Box, place
from moebalance.report.methods import LOOKS, looks
from moebalance.report.plots import curve, curves, scatter, window_of
from moebalance.runlog import Run, find_runs, read_run
from synthetic_runs import NONE, PHI, made, write_run

INK = Ink("#000", "#555", "#ddd", "#fff", dict.fromkeys(LOOKS, "#123456"))


def pixels(svg: ET.Element, axis: str) -> list[tuple[float, float]]:
    """(value, pixel) of every tick: what a reader would measure with."""
    return [
        (float(t.text or ""), float(t.get(axis, "")))
        for t in svg.iter("text")
        if t.get("class") == f"tick {axis}"
    ]


def read_off(ticks: list[tuple[float, float]], pixel: float, *, log: bool) -> float:
    (v0, p0), (v1, p1) = ticks[0], ticks[-1]
    share = (pixel - p0) / (p1 - p0)
    return v0 * (v1 / v0) ** share if log else v0 + share * (v1 - v0)


def test_marks_stand_where_the_axes_say(runs):
    section = summarise(runs)[0]
    text = scatter(section.methods, INK)
    assert text is not None
    svg = ET.fromstring(text)
    x, y = pixels(svg, "x"), [(value, pixel - 4) for value, pixel in pixels(svg, "y")]
    marks = {}
    for group in svg.iter("g"):
        mark = group.find("path[@class='mark']")
        if mark is not None:
            at = re.fullmatch(r"translate\((.*),(.*)\)", mark.get("transform", ""))
            assert at is not None
            marks[group.get("data-method")] = (float(at[1]), float(at[2]))
    assert len(marks) == len(section.methods)
    for method in section.methods:
        across, up = marks[method.method]
        expected = method.estimates["maxvio"].mean, method.estimates["loss"].mean
        assert read_off(x, across, log=True) == pytest.approx(expected[0], rel=0.01)
        assert read_off(y, up, log=False) == pytest.approx(expected[1], abs=2e-4)


def test_error_bars_are_one_deviation_long():
    runs = made(phi=PHI, none=NONE, switch={"loss": [1.0, 1.1, 1.2], "maxvio": [2.0, 2.1, 2.2]})
    methods = summarise(runs)[0].methods
    text = scatter(methods, INK)
    assert text is not None
    svg = ET.fromstring(text)
    x = pixels(svg, "x")
    for method in methods:
        group = next(g for g in svg.iter("g") if g.get("data-method") == method.method)
        bar = group.find("path[@class='bar']")
        assert bar is not None
        low, high = re.findall(r"M(\S+) \S+?H(\S+?)M", bar.get("d", ""))[0]
        sd = method.estimates["maxvio"].sd
        assert sd is not None
        width = read_off(x, float(high), log=False) - read_off(x, float(low), log=False)
        assert width == pytest.approx(2 * sd, abs=0.02)


def test_a_curve_is_the_mean_over_windows_then_over_runs():
    def run(values: list[float | None]) -> Run:
        steps = tuple({"step": i, "maxvio": v} for i, v in enumerate(values, 1))
        return Run(Path("x"), {"method": "phi"}, steps=steps)

    points = curve([run([1.0, 3.0, None, 5.0]), run([2.0, 4.0, 6.0, 8.0])], "maxvio", 2)
    assert [(p.step, p.mean, p.low, p.high) for p in points] == [
        (1.5, 2.5, 2.0, 3.0),
        (3.5, 6.0, 5.0, 7.0),
    ]


def test_long_runs_are_thinned_out(tmp_path):
    write_run(tmp_path / "run", "phi", steps=2000)
    (section,) = summarise(find_runs(tmp_path))
    assert window_of(section.methods) == 17
    text = curves(section.methods, INK)
    assert text is not None
    line = ET.fromstring(text).find(".//path[@class='line']")
    assert line is not None
    assert 100 <= len(re.split("[ML]", line.get("d", ""))) - 1 <= 120


def test_the_axis_is_logarithmic_only_where_it_helps():
    assert Axis.over([1.0, 30.0], 0, 100, log_above=20).log
    assert not Axis.over([1.0, 3.0], 0, 100, log_above=20).log
    assert not Axis.over([0.0, 3.0], 0, 100, log_above=20).log


@pytest.mark.parametrize(
    "values", [[0.0], [1.0], [-2.0, 3.0], [1e-9, 1e9], [1.6, 1.6], [5e-324], []]
)
@pytest.mark.parametrize("log_above", [8, math.inf])
def test_axes_hold_their_values_and_have_ticks(values, log_above):
    axis = Axis.over(values, 0, 100, log_above=log_above)
    for value in values:
        assert 0 <= axis.at(value) <= 100
    for value, _ in axis.ticks():
        assert axis.low <= value * (1 + 1e-9) + 1e-12
        assert value <= axis.high * (1 + 1e-9) + 1e-12


def test_map_cells_carry_the_load(tmp_path):
    write_run(tmp_path, "phi", load=[[0.5, 0.25, 0.25, 0.0]], layers=1)
    text = load_map(read_run(tmp_path), INK)
    assert text is not None
    cells = list(ET.fromstring(text).iter("rect"))
    assert [c.get("class") for c in cells] == ["h9", "h6", "h6", "dead"]
    assert [c.findtext("title") for c in cells] == [
        "layer 0, expert 0: 2.00×",
        "layer 0, expert 1: 1.00×",
        "layer 0, expert 2: 1.00×",
        "layer 0, expert 3: 0.00×",
    ]


def test_map_colours_are_symmetric_around_an_even_share():
    for ratio in (1.0, 1.3, 2.0, 3.1, 4.0, 60.0):
        up, down = (int(colour_class(r)[1:]) for r in (ratio, max(1 / ratio, 0.02)))
        assert up - 6 == 6 - down


def test_a_large_model_is_binned_but_keeps_its_mean(tmp_path):
    write_run(tmp_path, "phi", experts=256, layers=40)
    text = load_map(read_run(tmp_path), INK, max_cells=2000)
    assert text is not None
    cells = list(ET.fromstring(text).iter("rect"))
    assert len(cells) <= 2000
    assert (cells[0].findtext("title") or "").startswith("layer 0, mean of ranks 1 to 6: ")


def test_labels_keep_apart_and_inside():
    bounds = Box(0, 0, 600, 400)
    anchors = [Anchor(290 + 7 * i, 200 - 5 * i, f"method {i}") for i in range(8)]
    boxes = place(anchors, [], bounds)
    for i, box in enumerate(boxes):
        assert box.overlap(bounds) == pytest.approx((box.right - box.left) * (box.bottom - box.top))
        assert sum(box.overlap(other) for other in boxes[i + 1 :]) == 0


def test_a_method_looks_the_same_in_every_company():
    assert looks(["phi", "none"])["phi"] == looks(["switch", "phi"])["phi"] == LOOKS["phi"]
    colours = [look.light for look in LOOKS.values()] + [look.dark for look in LOOKS.values()]
    assert len(set(colours)) == len(colours)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("method", LOOKS)
def test_marks_stand_out_from_the_page(method):
    look = LOOKS[method]
    assert (luminance("#fdfdfc") + 0.05) / (luminance(look.light) + 0.05) >= 3
    assert (luminance(look.dark) + 0.05) / (luminance("#15171a") + 0.05) >= 3


def test_the_figure_stands_alone(runs, tmp_path):
    path = write_figure(runs, tmp_path / "figures" / "scatter.svg")
    svg = ET.parse(path).getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text("utf-8")
    assert "var(" not in text
    assert text.count("http") == 1  # the namespace
    card = next(iter(svg))
    assert (card.tag.endswith("rect"), card.get("fill")) == (True, "#ffffff")
    assert "φ-balancing" in text


def test_no_figure_without_numbers(tmp_path):
    write_run(tmp_path, "phi", evaluate=False)
    with pytest.raises(ValueError, match="nothing to draw"):
        write_figure([read_run(tmp_path)], tmp_path / "f.svg")
