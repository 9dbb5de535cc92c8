"""The figures: marks, bars, curves and maps measured back off the axes as a reader would."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from moebalance.report import summarise, write_figure
from moebalance.report.canvas import GROUND, MARKS, sheet
from moebalance.report.draw import (
    DEAD_SHADE,
    SHADES,
    cells,
    curve,
    scatter,
    shade,
    window_of,
    write_names,
)
from moebalance.report.embed import shape_of
from moebalance.report.frames import ranked
from moebalance.report.labels import overlap, place
from moebalance.report.loads import layer_names, ratios
from moebalance.report.methods import LOOKS, MARKERS, look, looks, word_of
from moebalance.report.pictures import _course as course_picture
from moebalance.report.pictures import plane
from moebalance.runlog import Run, find_runs, read_run
from synthetic_runs import NONE, PHI, described, made, write_run


def pixels(svg: ET.Element, axis: str) -> list[tuple[float, float]]:
    """(value, pixel) of every tick: what a reader would measure with."""
    found = []
    for tick in svg.iter("g"):
        if tick.get("class") == f"tick {axis}":
            text, grid = tick.find("text"), tick.find("path")
            if text is None:
                continue  # a small tick without a number
            assert grid is not None
            place = re.match(r"M (\S+) (\S+)", grid.get("d", ""))
            assert place is not None
            if text.text:
                found.append((float(text.text), float(place["xy".index(axis) + 1])))
    return found


def read_off(ticks: list[tuple[float, float]], pixel: float, *, log: bool) -> float:
    (v0, p0), (v1, p1) = ticks[0], ticks[-1]
    share = (pixel - p0) / (p1 - p0)
    return v0 * (v1 / v0) ** share if log else v0 + share * (v1 - v0)


def test_marks_stand_where_the_axes_say(runs):
    section = summarise(runs)[0]
    svg = ET.fromstring(plane(section.methods, 640, 640, None) or "")
    x, y = pixels(svg, "x"), pixels(svg, "y")
    marks = {}
    for group in svg.iter("g"):
        mark = group.find("path[@class='mark']")
        if mark is not None:
            at = re.fullmatch(r"translate\((.*) (.*)\)", mark.get("transform", ""))
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
    svg = ET.fromstring(plane(methods, 640, 640, None) or "")
    x = pixels(svg, "x")
    for method in methods:
        bars = [
            g.find("path[@class='bar']")
            for g in svg.iter("g")
            if g.get("data-method") == method.method
        ]
        bar = next(bar for bar in bars if bar is not None)
        low, high = re.findall(r"[ML] (\S+) \S+", bar.get("d", ""))
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
    svg = ET.fromstring(course_picture(section.methods, "maxvio", "MaxVio", {}) or "")
    line = svg.find(".//path[@class='line']")
    assert line is not None
    assert 100 <= len(re.split("[ML]", line.get("d", ""))) - 1 <= 120


def drawn(**values) -> tuple[str, str]:
    """The scales of the scatter of one run with these numbers, across and up."""
    axes = Figure().subplots()
    scatter(axes, summarise(made(**values))[0].methods)
    return axes.get_xscale(), axes.get_yscale()


def test_the_axis_is_logarithmic_only_where_it_helps():
    near, far = {"loss": [1.0], "maxvio": [1.0]}, {"loss": [1.1], "maxvio": [30.0]}
    assert drawn(phi=near, none=far) == ("log", "linear")
    assert drawn(phi=near, none={**far, "maxvio": [3.0]}) == ("linear", "linear")
    assert drawn(phi={**near, "maxvio": [0.0]}, none=far) == ("linear", "linear")


@pytest.mark.parametrize(
    "values", [[0.0], [1.0], [-2.0, 3.0], [1e-9, 1e9], [1.6, 1.6], [5e-324], [1e30]]
)
@pytest.mark.parametrize("metric", ["loss", "maxvio"])
def test_axes_hold_their_values_and_have_ticks(values, metric):
    other = {"loss": "maxvio", "maxvio": "loss"}[metric]
    words = ("phi", "switch")
    runs = made(**{w: {metric: [v], other: [1.0]} for w, v in zip(words, values, strict=False)})
    methods = summarise(runs)[0].methods
    with sheet(400, 400) as (figure, axes):
        scatter(axes, methods)
        write_names(axes, methods)
        figure.draw_without_rendering()
        low, high = axes.get_xlim() if metric == "maxvio" else axes.get_ylim()
        axis = axes.xaxis if metric == "maxvio" else axes.yaxis
        assert all(low <= value <= high for value in values)
        assert any(low <= tick <= high for tick in axis.get_majorticklocs())


def test_an_axis_of_losses_that_differ_by_noise_does_not_look_like_an_order():
    runs = made(phi={"loss": [1.6001], "maxvio": [1.0]}, none={"loss": [1.6003], "maxvio": [3.0]})
    axes = Figure().subplots()
    scatter(axes, summarise(runs)[0].methods)
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(0.02)
    wide = Figure().subplots()
    scatter(wide, summarise(made(phi=PHI, none=NONE))[0].methods)
    assert wide.get_ylim()[1] - wide.get_ylim()[0] > 0.04


def areas(rows: list[list[float | None]]) -> dict[str, float]:
    """How many cells of each colour a map has."""
    found = {}
    for patch in cells(rows):
        colour = "#" + "".join(f"{round(255 * x):02x}" for x in patch.get_facecolor()[:3])
        boxes = [polygon[:, 0] for polygon in patch.get_path().to_polygons()]
        found[colour] = sum(box.max() - box.min() for box in boxes)
    return found


def test_map_cells_carry_the_load(tmp_path):
    write_run(tmp_path, "phi", load=[[0.5, 0.25, 0.25, 0.0]], layers=1)
    run = read_run(tmp_path)
    row = ranked(ratios(run.evals[-1], "load")[0], 99)
    assert row == [2.0, 1.0, 1.0, 0.0]
    assert layer_names(run, 1) == ["layer 0"]
    assert [shade(r) for r in row] == [SHADES[9], SHADES[6], SHADES[6], DEAD_SHADE]
    assert areas([row]) == {SHADES[9]: 1, SHADES[6]: 2, DEAD_SHADE: 1}
    assert areas([[1.0, 2.0], [None, 1.0]]) == {SHADES[6]: 2, SHADES[9]: 1, GROUND: 1}


def test_map_colours_are_symmetric_around_an_even_share():
    for ratio in (1.0, 1.3, 2.0, 3.1, 4.0, 60.0):
        up, down = (SHADES.index(shade(r)) for r in (ratio, max(1 / ratio, 0.02)))
        assert up - 6 == 6 - down


def test_a_large_model_is_binned_but_keeps_its_mean(tmp_path):
    write_run(tmp_path, "phi", experts=256, layers=40)
    layers = ratios(read_run(tmp_path).evals[-1], "load")
    rows = [ranked(layer, 2000 // 40) for layer in layers]
    assert sum(map(len, rows)) <= 2000
    top = sorted((r for r in layers[0] if r is not None), reverse=True)[:6]
    assert rows[0][0] == pytest.approx(sum(top) / 6)  # the mean of ranks 1 to 6


def test_labels_keep_apart_and_inside():
    bounds = np.array([0.0, 0.0, 600.0, 400.0])
    points = np.array([[290.0 + 7 * i, 200.0 - 5 * i] for i in range(8)])
    boxes = place(points, [6.6 * 8] * 8, np.empty((0, 4)), bounds)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    assert overlap(boxes, bounds[None])[:, 0] == pytest.approx(area)
    assert overlap(boxes, boxes).sum() == pytest.approx(area.sum())  # each with itself alone
    assert overlap(boxes, np.hstack([points - 7, points + 7])).sum() == 0


@pytest.mark.parametrize("width", [640, 360])
def test_every_mark_has_its_name_beside_it_on_a_phone_as_well(runs, width):
    methods = summarise(runs)[0].methods
    svg = ET.fromstring(plane(methods, width, 640, None) or "")
    names = [
        (text.text, group.get("data-method"))
        for group in svg.iter("g")
        for text in group.findall("text[@class='name']")
    ]
    assert sorted(names) == sorted((m.label, m.key) for m in methods)


def test_what_the_page_is_given_follows_its_theme_and_refers_to_nothing(runs):
    methods = summarise(runs)[0].methods
    paint = {m.look.light: f"var(--m{i})" for i, m in enumerate(methods)}
    text = plane(methods, 640, 640, paint) or ""
    assert "var(--m0)" in text
    assert not any(m.look.light in text for m in methods)
    assert not re.search(r"url\(|href|<use|<defs|<style|id=", text)


def test_marks_of_tables_are_those_of_figures():
    for marker in MARKERS:
        numbers = [float(x) for x in re.findall(r"-?[\d.]+", shape_of(marker))]
        assert max(map(abs, numbers)) <= 8
        assert shape_of(marker).count("M") == 1
    assert len(set(map(shape_of, MARKERS))) == len(MARKS) == 12


def test_a_method_looks_the_same_in_every_company():
    assert looks(["phi", "none"])["phi"] == looks(["switch", "phi"])["phi"] == LOOKS["phi"]
    colours = [one.light for one in LOOKS.values()] + [one.dark for one in LOOKS.values()]
    assert len(set(colours)) == len(colours)


UNLISTED = [f"{first}-{second}" for first in ("top", "bias", "soft", "m") for second in "abcdefgh"]


def test_a_method_that_is_not_listed_has_a_look_of_its_own_that_stays():
    assert looks(["smebu", "phi"])["smebu"] == look("smebu")
    found = {(one.light, one.marker) for one in map(look, UNLISTED)}
    assert len(found) == len(UNLISTED)
    assert look("expert-choice").name == "Expert choice"
    assert look("phi+sequence").name == "φ-balancing + Sequence loss"
    assert [word_of(k) for k in ("SMEBU", "ExpertChoice", "NoBalancing")] == [
        *("smebu", "expert-choice", "none")
    ]


def test_settings_of_one_method_are_told_apart_by_colour_mark_and_line():
    for method in (*LOOKS, "smebu"):
        found = [look(method, i) for i in range(4)]
        for part in ("light", "dark", "marker", "line"):
            assert len({getattr(one, part) for one in found}) == 4, (method, part)


def test_a_setting_has_one_name_and_one_look_in_the_whole_report(tmp_path):
    for strength in (0.01, 0.1):
        for batching in ("mixed", "one-domain") if strength == 0.1 else ("mixed",):
            method_repr = f"PhiBalancing(strength={strength})"
            header = {"method_repr": method_repr, "parts": described(method_repr)}
            write_run(tmp_path / f"{strength}-{batching}", "phi", batching=batching, header=header)
    first, second = summarise(find_runs(tmp_path))
    assert [m.label for m in first.methods] == [
        *("φ-balancing · strength=0.01", "φ-balancing · strength=0.1")
    ]
    (alone,) = second.methods
    assert (alone.label, alone.look, alone.key) == tuple(
        getattr(first.methods[1], name) for name in ("label", "look", "key")
    )


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("method", [*LOOKS, *UNLISTED])
@pytest.mark.parametrize("setting", [0, 1, 2, 3])
def test_marks_stand_out_from_the_page(method, setting):
    found = look(method, setting)
    assert (luminance("#fdfdfc") + 0.05) / (luminance(found.light) + 0.05) >= 3
    assert (luminance(found.dark) + 0.05) / (luminance("#15171a") + 0.05) >= 3


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
