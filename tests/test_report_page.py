"""The page: whole, offline and light, escaped, and honest whatever the logs hold or lack."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from moebalance.report import summarise, summary_rows, write_figure, write_report
from moebalance.report.summary import METRICS
from moebalance.runlog import LOG_NAME, find_runs
from synthetic_runs import sentence, write_run, write_runs


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> str:
    return write_report(runs, tmp_path_factory.mktemp("page") / "report.html").read_text("utf-8")


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


def test_the_table_of_runs_tells_settings_apart_and_the_leader_is_bold(tmp_path):
    for i, strength in enumerate((0.01, 0.03)):
        header = {"method_repr": f"PhiBalancing(strength={strength})", "parts": None}
        write_run(tmp_path / str(i), "phi", header=header)
    write_run(tmp_path / "best", "phi+loss-free", header={"batching": None})
    runs = find_runs(tmp_path)
    table = write_report(runs, tmp_path / "r.html").read_text("utf-8").split('class="runs"')[1]
    for strength in (0.01, 0.03):
        assert f"<td>φ-balancing · strength={strength}</td><td>mixed</td>" in table
    assert "<td>φ + loss-free</td><td>—</td>" in table
    write_run(tmp_path / "mixed", "phi+loss-free")
    html = write_report(find_runs(tmp_path), tmp_path / "r.html").read_text("utf-8")
    assert set(re.findall(r'class="subject">\s*<th[^>]*data-sort="([^"]*)"', html)) == {
        "φ + loss-free"
    }


def test_step_times_are_shown_of_runs_that_took_turns_only(runs, page, tmp_path):
    assert 'popovertarget="help-time"' not in page
    turns = [dataclasses.replace(r, header={**r.header, "interleaved": True}) for r in runs]
    html = write_report(turns, tmp_path / "r.html").read_text("utf-8")
    row = next(r for r in summary_rows(turns) if r["method"] == "switch")
    line = re.search(r'<tr>\s*<th scope="row" data-sort="Switch loss".*?</tr>', html, re.DOTALL)
    assert line is not None
    assert f"{row['step_time_ratio']:.2f}×" in line[0]
    heads = [a for tag, a in check_html(html).tags if tag == "th" and "aria-sort" in a]
    assert len(heads) == 2 * 12


def test_columns_are_buttons_with_aria_sort_and_words(page):
    checker = check_html(page)
    heads = [a for tag, a in checker.tags if tag == "th" and "aria-sort" in a]
    assert len(heads) == 2 * 11
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
            "method_repr": bad,
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
    assert sentence(runs).startswith("No balancing shows MaxVio")
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
