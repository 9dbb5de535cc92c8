"""The report: its numbers, its sentence, its figures, and that it survives whatever logs hold."""

from __future__ import annotations

import json
import math
import re
import statistics
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy import stats

from moebalance.report import (
    summarise,
    summary_rows,
    write_figure,
    write_markdown,
    write_report,
)
from moebalance.report.axes import Axis, Ink
from moebalance.report.heatmap import colour_class, load_map
from moebalance.report.labels import Anchor, Box, place
from moebalance.report.methods import LOOKS, looks
from moebalance.report.plots import curve, curves, scatter, window_of
from moebalance.report.summary import METRICS
from moebalance.report.verdict import T_975, paired
from moebalance.runlog import LOG_NAME, Run, archive, find_runs, read_run
from synthetic_runs import METHODS, write_run, write_runs

INK = Ink("#000", "#555", "#ddd", "#fff", dict.fromkeys(LOOKS, "#123456"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    return find_runs(write_runs(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> str:
    return write_report(runs, tmp_path_factory.mktemp("page") / "report.html").read_text("utf-8")


def made(**values: dict[str, list[float | None]]) -> list[Run]:
    """Runs with these evaluation numbers: ``phi={"loss": [one a seed], "maxvio": […]}``."""
    runs = []
    for word, numbers in values.items():
        method = word.replace("_", "-")
        seeds = len(next(iter(numbers.values())))
        for seed in range(seeds):
            header = {"kind": "header", "format": 1, "method": method, "seed": seed, "steps": 5}
            row = {key: numbers[key][seed] for key in numbers}
            evals = ({"kind": "eval", "step": 5, **row},)
            runs.append(
                Run(Path(f"{method}-{seed}/{LOG_NAME}"), header | {"balancer": ""}, evals=evals)
            )
    return runs


def sentence(runs: list[Run]) -> str:
    (section,) = summarise(runs)
    return section.verdict


# Numbers


def test_rows_are_means_and_deviations_over_seeds(runs):
    by_hand = [
        run.evals[-1] for run in runs if run.method == "phi" and run.batching == "one-domain"
    ]
    (row,) = [
        r for r in summary_rows(runs) if (r["method"], r["batching"]) == ("phi", "one-domain")
    ]
    for metric in METRICS:
        values = [e[metric.key] for e in by_hand]
        key = "val_loss" if metric.key == "loss" else metric.key
        assert row[key] == pytest.approx(statistics.mean(values), rel=1e-12)
        assert row[f"{key}_sd"] == pytest.approx(statistics.stdev(values), abs=1e-12)
    assert (row["seeds"], row["label"], row["partial"]) == (3, "φ-balancing", False)


def test_step_time_is_a_ratio_of_medians_to_no_balancing(runs):
    def median(method: str) -> float:
        chosen = [r for r in runs if r.method == method and r.batching == "mixed"]
        return statistics.median(
            statistics.median(row["step_time_s"] for row in run.steps) for run in chosen
        )

    rows = {r["method"]: r for r in summary_rows(runs) if r["batching"] == "mixed"}
    assert rows["none"]["step_time_ratio"] == 1.0
    for method in METHODS:
        assert rows[method]["step_time_s"] == pytest.approx(median(method))
        assert rows[method]["step_time_ratio"] == pytest.approx(median(method) / median("none"))


def test_rows_come_in_the_order_of_the_page(runs):
    rows = summary_rows(runs)
    assert [r["batching"] for r in rows] == ["mixed"] * 11 + ["one-domain"] * 11
    assert [r["method"] for r in rows[:11]] == list(LOOKS)


def test_the_t_table_is_students():
    for freedom, t in enumerate(T_975, 1):
        assert t == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_a_paired_difference_is_scipys(n):
    ours = {seed: 1.0 + math.sin(seed) / 50 for seed in range(n)}
    theirs = {seed: 1.01 + math.cos(3 * seed) / 50 for seed in range(n)}
    found = paired(ours, theirs)
    test = stats.ttest_rel(list(ours.values()), list(theirs.values()))
    low, high = test.confidence_interval(0.95)
    assert found is not None
    assert found.half is not None
    assert found.mean == pytest.approx((low + high) / 2)
    # Beyond thirty degrees of freedom the table's last entry widens the interval by under 1 %.
    assert found.half == pytest.approx((high - low) / 2, rel=1e-3 if n <= 31 else 0.02)
    assert (found.sign == 0) == (test.pvalue > 0.05)


def test_pairing_uses_the_seeds_both_have():
    assert paired({0: 1.0}, {1: 1.0}) is None
    found = paired({0: 1.0, 2: 9.0}, {0: 3.0, 1: 7.0})
    assert found is not None
    assert (found.mean, found.half, found.n, found.sign) == (-2.0, None, 1, None)


# The sentence

NONE = {"loss": [1.640, 1.630, 1.635], "maxvio": [4.3, 4.5, 4.1]}
PHI = {"loss": [1.609, 1.600, 1.603], "maxvio": [0.85, 0.90, 0.80]}
LIKE_PHI = {"loss": [1.608, 1.602, 1.602], "maxvio": [0.25, 0.24, 0.26]}


def test_verdict_when_phi_is_better():
    text = sentence(made(phi=PHI, none=NONE, switch=LIKE_PHI))
    assert text.startswith(
        "φ-balancing cut MaxVio from 4.30 ± 0.20 (no balancing) to 0.85 ± 0.05 and lowered "
        "validation loss by 0.031 nats/token (95 % interval 0.029 to 0.033) over 3 paired seeds; "
    )
    assert "its loss differs from that of Switch loss by no more than seed noise" in text
    assert text.endswith("the lowest MaxVio is that of Switch loss, 0.25 ± 0.01.")
    assert text.count(".") - len(re.findall(r"\d\.\d", text)) == 1  # one sentence


def test_verdict_when_phi_is_worse():
    text = sentence(
        made(phi={**NONE, "loss": [1.70, 1.69, 1.71]}, none={**PHI, "loss": NONE["loss"]})
    )
    assert "raised MaxVio from 0.85 ± 0.05 (no balancing) to 4.30 ± 0.20" in text
    assert "and raised validation loss by 0.065 nats/token" in text


def test_verdict_when_balance_costs_loss():
    text = sentence(made(phi={**PHI, "loss": [1.70, 1.69, 1.71]}, none=NONE))
    assert "cut MaxVio" in text
    assert ", but raised validation loss by 0.065 nats/token" in text


def test_verdict_within_noise():
    noisy = {"loss": [1.60, 1.66, 1.64], "maxvio": [4.6, 4.0, 4.3]}
    text = sentence(made(phi=noisy, none=NONE))
    assert (
        "left MaxVio within seed noise (4.30 ± 0.30 against 4.30 ± 0.20 with no balancing)" in text
    )
    assert "its validation loss stayed within seed noise (change −0.002, 95 % interval −0.0" in text
    assert "over 3 paired seeds" in text


def test_verdict_with_one_seed_claims_nothing():
    text = sentence(
        made(
            phi={"loss": [1.60], "maxvio": [0.8]},
            switch={"loss": [1.61], "maxvio": [0.9]},
            none={"loss": [1.64], "maxvio": [4.3]},
        )
    )
    assert "MaxVio 0.80 against 4.30 and validation loss 1.600 against 1.640" in text
    assert "with one shared seed the noise is unknown" in text
    assert "no order among the methods can be told" in text
    assert "cut" not in text
    assert "±" not in text


def test_verdict_without_a_shared_seed():
    runs = made(phi=PHI, none=NONE)
    for run in runs[3:]:
        run.header["seed"] += 10  # type: ignore[index]
    assert "share no seed, so their difference cannot be told from noise" in sentence(runs)


def test_verdict_without_a_baseline():
    text = sentence(made(phi=PHI, switch=LIKE_PHI))
    assert text.startswith(
        "φ-balancing reached MaxVio 0.85 ± 0.05 and validation loss 1.604 ± 0.005"
    )
    assert "no run without balancing is here" in text


def test_verdict_without_phi():
    text = sentence(made(switch=LIKE_PHI, quantile=PHI, none=NONE))
    assert text.startswith(
        "φ-balancing is not among these runs; the lowest MaxVio is that of Switch"
    )
    assert "0.25 ± 0.01 against 4.30 ± 0.20 with no balancing" in text
    assert "within seed noise of Quantile balancing" in text


def test_verdict_names_the_methods_that_differ():
    worse, better = [1.65, 1.64, 1.643], [1.55, 1.54, 1.545]
    text = sentence(
        made(
            phi=PHI,
            switch={"loss": worse, "maxvio": [1.0, 1.1, 1.2]},
            sinkhorn={"loss": better, "maxvio": [1.0, 1.1, 1.2]},
            quantile=LIKE_PHI,
            none=NONE,
        )
    )
    assert re.search(
        r"lower than that of Switch loss, higher than that of Sinkhorn and within seed noise of "
        r"Quantile balancing \(95 % each, uncorrected for 3 comparisons\)",
        text,
    )


def test_verdict_with_lost_numbers_stays_careful():
    text = sentence(made(phi={"loss": [1.6, None, None], "maxvio": [0.8, 0.9, 0.8]}, none=NONE))
    assert "cut MaxVio" in text
    assert "lowered validation loss by 0.040 nats/token (noise unknown)" in text
    text = sentence(made(phi={"loss": [None] * 3, "maxvio": [None] * 3}, none=NONE))
    assert text.startswith("φ-balancing is not among these runs")


def test_a_sweep_is_told_apart_and_its_best_speaks(tmp_path):
    for strength, shift in (("0.001", 0.0), ("0.01", -0.02)):
        for seed in (0, 1):
            write_run(
                tmp_path / f"{strength}-{seed}",
                "phi",
                seed=seed,
                header={
                    "balancer": f"PhiBalancing(NegativeEntropy(a=1, b=2), strength={strength})"
                },
                loss=1.6 + shift + seed / 100,
                maxvio=0.9 if shift else 0.4,
            )
    (section,) = summarise(find_runs(tmp_path))
    labels = [m.label for m in section.methods]
    assert labels == ["φ-balancing · strength=0.001", "φ-balancing · strength=0.01"]
    assert "strength=0.01 (the best by validation loss of 2 settings)" in section.verdict
    assert "lowest MaxVio is that of φ-balancing · strength=0.001, 0.40" in section.verdict


# What is not whole is shown and marked


def test_a_run_cut_short_is_noted_and_not_averaged(tmp_path):
    write_runs(tmp_path, methods=["phi", "none"], batchings=["mixed"])
    write_run(tmp_path / "cut", "phi", seed=7, stop=20, loss=99.0)
    write_run(tmp_path / "killed", "none", seed=8, stop=10, evaluate=False, end=False)
    runs = find_runs(tmp_path)
    (section,) = summarise(runs)
    assert section.methods[0].estimates["loss"].mean < 2
    notes = " ".join(section.notes)
    assert (
        "φ-balancing, seed 7: interrupted, stopped at step 20 of 60; not in the averages" in notes
    )
    assert "No balancing, seed 8: no end row, stopped at step 10 of 60; no evaluation" in notes
    html = write_report(runs, tmp_path / "r.html").read_text("utf-8")
    assert "no end row (killed, or still running)" in html
    assert "cut" in html
    assert 'class="warn">interrupted<' in html


def test_a_method_without_a_whole_run_is_shown_and_compared_with_nothing(tmp_path):
    write_runs(tmp_path, methods=["none"], batchings=["mixed"])
    write_run(tmp_path / "cut", "phi", seed=0, stop=20)
    runs = find_runs(tmp_path)
    assert sentence(runs).startswith("φ-balancing is not among these runs")
    html = write_report(runs, tmp_path / "r.html").read_text("utf-8")
    assert "not finished" in html
    assert "shown with its evaluation at step 20, in no comparison" in html


def test_a_truncated_log_is_reported_as_such(tmp_path):
    path = write_run(tmp_path / "a", "phi") / LOG_NAME
    path.write_bytes(path.read_bytes()[:-9])
    html = write_report(find_runs(tmp_path), tmp_path / "r.html").read_text("utf-8")
    assert "last line cut off" in html


def test_a_diverged_run_is_named(tmp_path):
    write_runs(tmp_path, methods=["phi", "none"], batchings=["mixed"])
    write_run(tmp_path / "bad", "phi", seed=9, loss=float("nan"), maxvio=None)
    (section,) = summarise(find_runs(tmp_path))
    assert section.methods[0].estimates["loss"].n == 3
    assert any("seed 9: the validation loss is not a finite number" in n for n in section.notes)


def test_runs_that_are_not_alike_are_not_compared_in_silence(tmp_path):
    write_run(tmp_path / "a", "phi", steps=40, experts=16, layers=3)
    write_run(tmp_path / "b", "none", steps=60)
    runs = find_runs(tmp_path)
    notes = " ".join(summarise(runs)[0].notes)
    assert "differ in model" in notes
    assert "differ in number of steps" in notes
    assert "several models" in write_report(runs, tmp_path / "r.html").read_text("utf-8")


def test_one_seed_run_twice_is_one_sample(tmp_path):
    for name, loss in (("a", 1.0), ("b", 2.0)):
        write_run(tmp_path / name, "phi", seed=0, loss=loss)
    (section,) = summarise(find_runs(tmp_path))
    estimate = section.methods[0].estimates["loss"]
    assert (estimate.mean, estimate.sd, estimate.n) == (1.5, None, 1)
    assert any("seed 0 was run 2 times" in note for note in section.notes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"snapshots": False},
        {"evaluate": False, "end": False, "stop": 30},
        {"evaluate": False, "snapshots": False, "stop": 0, "end": False},
        {"loss": None, "maxvio": None, "load": None, "domain_load": [], "dead_experts": None},
        {"load": [[float("nan")] * 4, [0.0] * 4], "domain_load": [[[0.0, 0.0]], [[1.0]]]},
        {"load": "much", "domain_load": {"a": 1}, "maxvio": "high"},
        {"experts": 256, "layers": 40},
        {"steps": 2000},
        {"header": {"model": None, "data": None, "seed": None, "recipe": None, "versions": None}},
        {"header": {"model": {}, "data": {"domains": []}, "steps": None, "commit": None}},
    ],
)
def test_a_page_comes_out_whatever_the_log_lacks(tmp_path, options):
    write_run(tmp_path / "run", "phi", **options)
    html = write_report(find_runs(tmp_path), tmp_path / "out" / "r.html").read_text("utf-8")
    check_html(html)
    assert "φ-balancing" in html


def test_no_runs_is_an_error():
    with pytest.raises(ValueError, match="at least one run"):
        summarise([])


# The page

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Checker(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def check_html(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    for tag, attributes in checker.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "image", "use"}
        assert not {"src", "href", "srcset", "xlink:href", "data"} & attributes.keys()
    assert not re.search(r"https?://|url\(|@import", html)
    assert "nan" not in re.findall(r'="[^"]*\b(nan|inf|None)\b', html)
    assert len(html.encode()) < 1_000_000
    return checker


def test_the_page_is_whole_offline_and_light(page):
    checker = check_html(page)
    assert sum(tag == "section" for tag, _ in checker.tags) == 3
    ids = [attributes["id"] for _, attributes in checker.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_runs_give_the_same_page(runs, page, tmp_path):
    assert write_report(runs, tmp_path / "again.html").read_text("utf-8") == page


def test_the_page_says_what_was_run(page):
    for words in (
        "Qwen3MoeForCausalLM, 463\u202fk parameters (201\u202fk active), 32 experts, top-4, 2 MoE",
        "1.24\u202fM training tokens of code, prose, dialogue, tables",
        "seeds 0, 1, 2",
        "Mixed micro-batches",
        "One-domain micro-batches",
        "0123abc",
        "a" * 64,
        "optimizer.lr",
        "PhiBalancing(potential=NegativeEntropy(), strength=0.001, rate=0.3)",
        "prefers-color-scheme: dark",
    ):
        assert words in page


def test_the_table_holds_the_numbers_it_shows(runs, page):
    row = next(r for r in summary_rows(runs) if r["method"] == "switch")
    line = re.search(r'<tr>\s*<th scope="row" data-sort="Switch loss".*?</tr>', page, re.DOTALL)
    assert line is not None
    assert f'data-sort="{row["val_loss"]!r}">{row["val_loss"]:.3f}<small>± ' in line[0]
    assert f"{row['step_time_ratio']:.2f}×" in line[0]


def test_columns_are_buttons_with_aria_sort_and_words(page):
    checker = check_html(page)
    heads = [a for tag, a in checker.tags if tag == "th" and "aria-sort" in a]
    assert len(heads) == 2 * 12
    for metric in METRICS:
        assert f"<dt>{metric.title}</dt>" in page


def test_markup_in_names_is_escaped(tmp_path):
    bad = "<i>&\"'</script>"
    write_run(
        tmp_path / "run",
        bad,
        batching=bad,
        header={
            "name": bad,
            "balancer": bad,
            "recipe": {bad: bad},
            "commit": bad,
            "data": {"domains": [bad] * 4},
        },
    )
    runs = find_runs(tmp_path)
    html = write_report(runs, tmp_path / "r.html", title=bad).read_text("utf-8")
    check_html(html)
    assert "<i>" not in html
    assert html.count("</script>") == 1
    ET.parse(write_figure(runs, tmp_path / "f.svg"))


# The figures


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


def test_rows_are_plain_values(runs):
    assert json.loads(json.dumps(summary_rows(runs))) == summary_rows(runs)


def test_an_archived_run_reports_the_same_table(runs, tmp_path):
    copies = [read_run(archive(run, tmp_path / "kept" / str(i))) for i, run in enumerate(runs)]
    assert summary_rows(copies) == summary_rows(runs)
    assert not any(copy.steps for copy in copies)
    assert sum(c.path.stat().st_size for c in copies) < sum(r.path.stat().st_size for r in runs) / 2


def test_markdown_holds_the_verdict_and_a_row_for_each_method(runs, tmp_path):
    text = write_markdown(runs, tmp_path / "docs" / "t.md", "Title").read_text(encoding="utf-8")
    for section in summarise(runs):
        assert section.verdict in text
    rows = [line for line in text.splitlines() if line.startswith("| φ-balancing |")]
    assert len(rows) == len(summarise(runs))
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {13}
