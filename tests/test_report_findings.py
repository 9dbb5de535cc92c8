"""What the doctor finds stands in the report as well, by the same rules."""

from __future__ import annotations

import html
import re

from moebalance.report import write_report
from moebalance.report.estimates import method_summaries
from moebalance.report.findings import counted, remarks
from moebalance.runlog import find_runs
from synthetic_runs import write_run, write_runs


def found_in(folder):
    return remarks(tuple(method_summaries(find_runs(folder), ["loss"])))


def test_runs_of_one_method_share_a_line_that_says_how_many_and_whose_numbers(tmp_path):
    folder = write_runs(tmp_path, methods=["none", "switch"], batchings=["mixed"], steps=200)
    found = found_in(folder)
    uneven = [remark for remark in found if remark.finding.rule == "uneven"]
    assert [(r.method.method, r.where) for r in uneven] == [("none", "in 3 of 3 runs, here seed 0")]
    # One line for each layer that has dead experts, all of the same run.
    dead = [remark for remark in found if remark.finding.rule == "dead"]
    assert {remark.finding.layers for remark in dead} == {(0,), (1,)}
    assert {remark.where for remark in dead} == {"in 3 of 3 runs, here seed 0"}
    assert not any(remark.method.method == "switch" for remark in found)


def test_the_worst_comes_first_and_the_page_shows_it_beside_the_numbers(tmp_path):
    folder = write_runs(tmp_path, methods=["none"], seeds=[0, 1], batchings=["mixed"], steps=200)
    write_run(folder / "stopped", "phi", stop=150, steps=200)
    found = found_in(folder)
    ranks = [remark.finding.severity.rank for remark in found]
    assert ranks == sorted(ranks)
    assert counted(found) == "3 warnings, 2 notes"
    page = html.unescape(write_report(find_runs(folder), tmp_path / "report.html").read_text())
    (block,) = re.findall(r'<details class="findings".*?</details>', page, re.DOTALL)
    assert "What the doctor finds in these runs: 3 warnings, 2 notes" in block
    for remark in found:
        for words in (remark.finding.what, remark.finding.because, remark.finding.do):
            assert words in block
    assert not re.search(r"\bnan\b", block)


def test_a_run_that_failed_is_among_them_though_no_average_has_it(tmp_path):
    folder = write_runs(tmp_path, methods=["switch"], seeds=[0, 1], batchings=["mixed"], steps=200)
    write_run(folder / "failed", "switch", seed=2, steps=200, stop=120, end=False)
    (remark,) = found_in(folder)
    assert remark.finding.rule == "unfinished"
    assert remark.where == "in 1 of 3 runs, here seed 2"


def test_where_nothing_is_wrong_the_page_says_nothing(tmp_path):
    write_runs(tmp_path, methods=["switch"], batchings=["mixed"], steps=200)
    page = write_report(find_runs(tmp_path), tmp_path / "report.html").read_text()
    assert 'class="findings"' not in page
