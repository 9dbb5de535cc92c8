"""Figures for papers: what is drawn where, in which formats, and from which logs."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebalance.lab.cli import app
from moebalance.report import summarise, write_figure, write_figures
from moebalance.report.canvas import plain
from moebalance.report.draw import DEAD_SHADE, SHADES
from moebalance.report.figures import (
    FIGURES,
    load,
    load_by_rank,
    loss_against_maxvio,
    soft_against_hard,
    training,
)
from moebalance.runlog import find_runs, read_run
from synthetic_runs import PHI, made, write_run, write_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("runs")
    return write_runs(at, methods=("phi", "none"), seeds=(0, 1), batchings=("mixed",), steps=30)


@pytest.fixture(scope="module")
def section(folder):
    return summarise(find_runs(folder))[0]


def test_every_figure_is_written_in_every_format(folder, tmp_path):
    paths = write_figures(find_runs(folder), tmp_path, ("pdf", "svg", "png"))
    assert [path.name for path in paths] == [
        f"mixed-{name}.{ending}" for name in FIGURES for ending in ("pdf", "svg", "png")
    ]
    for path in paths:
        content = path.read_bytes()
        match path.suffix:
            case ".pdf":
                assert content.startswith(b"%PDF-")
                assert b"/Subtype /CIDFontType2" in content or b"/Subtype /TrueType" in content
                assert b"/Type3" not in content
            case ".svg":
                assert ET.fromstring(content).tag.endswith("svg")
            case ".png":
                assert content.startswith(b"\x89PNG")


def test_the_same_runs_give_the_same_bytes(folder, tmp_path):
    first, second = (
        write_figures(find_runs(folder), tmp_path / name, ("svg", "pdf")) for name in "ab"
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_marks_stand_at_the_means_with_one_deviation():
    (section,) = summarise(made(phi=PHI))
    axes = loss_against_maxvio(section).axes[0]
    ((mark, _, (across, up)),) = axes.containers
    estimates = section.methods[0].estimates
    x, y = estimates["maxvio"], estimates["loss"]
    assert list(mark.get_xydata()[0]) == pytest.approx([x.mean, y.mean])
    (low, _), (high, _) = across.get_segments()[0]
    assert (low, high) == pytest.approx((x.mean - x.sd, x.mean + x.sd))
    (_, low), (_, high) = up.get_segments()[0]
    assert (low, high) == pytest.approx((y.mean - y.sd, y.mean + y.sd))


def test_curves_are_means_within_the_band_of_the_seeds(folder, section):
    axes = training(section).axes[0]
    label = {line.get_label(): line for line in axes.get_lines()}
    runs = [run for run in find_runs(folder) if run.method == "phi"]
    tenth = [next(row["maxvio"] for row in run.steps if row["step"] == 10) for run in runs]
    steps = list(label["φ-balancing"].get_xdata())
    assert label["φ-balancing"].get_ydata()[steps.index(10)] == pytest.approx(sum(tenth) / 2)
    band = axes.collections[0].get_paths()[0].vertices
    at_ten = {round(float(y), 9) for x, y in band if x == 10}
    assert at_ten == {round(value, 9) for value in tenth}


def test_maps_and_ranks_show_the_loads_that_were_logged(tmp_path):
    loads = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    run = read_run(write_run(tmp_path / "run", "phi", experts=4, load=loads, soft=loads))
    (section,) = summarise([run])
    found = {}
    for patch in load(section).axes[0].patches:
        colour = "#" + "".join(f"{round(255 * x):02x}" for x in patch.get_facecolor()[:3])
        for box in (polygon.min(axis=0) for polygon in patch.get_path().to_polygons()):
            found[tuple(box)] = colour
    # Runs of cells alike are one; 2 shares, then twice an even one, then a dead expert; all even.
    assert found == {(0, 0): SHADES[9], (1, 0): SHADES[6], (3, 0): DEAD_SHADE, (0, 1): SHADES[6]}
    line = load_by_rank(section).axes[0].get_lines()[1]
    assert list(line.get_ydata()) == [1.5, 1, 1, 0.5]
    dots = soft_against_hard(section).axes[0].collections[0].get_offsets()
    assert dots.max() == pytest.approx(2)
    assert dots.min() == pytest.approx(2**-4)


def test_a_formula_or_markup_in_a_name_is_only_text(tmp_path):
    runs = []
    for i, name in enumerate((r"$\frac{", "<b>&amp;", "_hidden")):
        write_run(tmp_path / str(i), name, batching="../up")
        runs.append(read_run(tmp_path / str(i)))
    paths = write_figures(runs, tmp_path / "out", ("svg",))
    assert {path.parent for path in paths} == {tmp_path / "out"}
    (file,) = (tmp_path / "out").glob("*up-*-load.svg")
    drawn = ET.fromstring(file.read_bytes())
    texts = {"".join(node.itertext()) for node in drawn.iter() if node.tag.endswith("text")}
    assert {r"$\frac{", "<b>&amp;", "_hidden"} <= texts


@pytest.mark.parametrize(
    "options",
    [
        {"evaluate": False},
        {"snapshots": False, "evaluate": False},
        {"load": [], "soft": [], "domain_load": []},
        {"load": [[]], "soft": [[None, None]], "domain_load": [[[]]]},
        {"load": [[0.0, 0.0]], "soft": [[1.0]], "domain_load": [[[0.5, 0.5], [1.0]]]},
        {"loss": None, "maxvio": 0.0},
    ],
)
def test_figures_come_out_whatever_the_log_lacks(tmp_path, options):
    run = read_run(write_run(tmp_path / "run", "phi", steps=20, **options))
    assert any("training" in path.name for path in write_figures([run], tmp_path, ("svg",)))


def test_a_sweep_with_long_names_still_fits_its_column(tmp_path):
    runs = []
    for i in range(6):
        header = {
            "method_repr": f"PhiBalancing(strength={i}, potential=Something({'very_' * 9}long))"
        }
        runs.append(read_run(write_run(tmp_path / str(i), "phi", steps=5, header=header)))
    figure = loss_against_maxvio(summarise(runs)[0])
    figure.canvas.draw()  # a warning, which is an error here, if nothing is left for the axes
    assert figure.axes[0].get_position().height * figure.get_figheight() > 1


def test_panels_of_two_settings_are_headed_by_what_tells_them_apart(tmp_path):
    runs = []
    for strength in (0.01, 0.1):
        header = {"method_repr": f"PhiBalancing(strength={strength}, rate=0.3)"}
        runs.append(read_run(write_run(tmp_path / str(strength), "phi", steps=5, header=header)))
    (section,) = summarise(runs)
    heads = [axes.get_title(loc="left") for axes in load(section).axes[:2]]
    assert heads == ["φ-balancing\nstrength=0.01", "φ-balancing\nstrength=0.1"]
    lines = load_by_rank(section).axes[0].get_lines()[1:]
    assert len({line.get_color() for line in lines}) == len(
        {line.get_linestyle() for line in lines}
    )
    assert len({line.get_linestyle() for line in lines}) == 2


@pytest.mark.parametrize("name", ["中文 🎉", "a\rb", "a\tb", "a\nb"])
def test_a_name_that_the_font_lacks_is_drawn_without_a_warning(tmp_path, name):
    layers = {"model": {"architecture": "x", "layers": [name, f"{name} 2"]}}
    run = read_run(write_run(tmp_path / "a", name, steps=4, experts=4, header=layers))
    kinds = {path.suffix for path in write_figures([run], tmp_path, ("svg", "pdf", "png"))}
    assert kinds == {".svg", ".pdf", ".png"}


def test_a_name_is_one_line_of_a_figure():
    assert plain("a\tb\n\nc") == "a b c"


@pytest.mark.parametrize("name", ["f.png", "f.pdf", "f.svg.gz"])
def test_a_figure_is_not_written_under_the_name_of_another_format(folder, tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in \.svg.*--figures"):
        write_figure(find_runs(folder), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_runs_with_nothing_to_draw_are_refused(tmp_path):
    write_run(tmp_path / "run", "phi", stop=0, evaluate=False)
    with pytest.raises(ValueError, match="nothing to draw"):
        write_figures([read_run(tmp_path / "run")], tmp_path)


@pytest.mark.parametrize("formats", [("pdf", "gif"), ("jpeg",), ("",), ()])
def test_an_unknown_format_is_refused_before_anything_is_written(folder, tmp_path, formats):
    with pytest.raises(ValueError, match="the formats are pdf, svg, png"):
        write_figures(find_runs(folder), tmp_path / "out", formats)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_says_what_to_install(folder, tmp_path, monkeypatch):
    for name in ("canvas", "draw", "embed", "pictures", "figures"):
        monkeypatch.delitem(sys.modules, f"moebalance.report.{name}", raising=False)
        monkeypatch.delattr(f"moebalance.report.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"\.\[report\]"):
        write_figures(find_runs(folder), tmp_path)


def test_the_report_alone_imports_neither_matplotlib_nor_torch():
    code = "import sys, moebalance.report; print({'matplotlib', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_command_draws_beside_the_report(folder, tmp_path):
    asked = ["report", str(folder), "--out", str(tmp_path / "r.html"), "--figures", "svg"]
    done = CliRunner().invoke(app, [*asked, "--figures-dir", str(tmp_path / "figures")])
    assert done.exit_code == 0, done.output
    assert f"Figures: {len(FIGURES)} files" in done.output
    assert len(list((tmp_path / "figures").glob("mixed-*.svg"))) == len(FIGURES)
    refused = CliRunner().invoke(app, [*asked[:-1], "bmp"])
    assert refused.exit_code == 2
    assert "the formats are pdf, svg, png" in refused.output
