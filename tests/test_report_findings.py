"""What the doctor finds stands in the report as well, by the same rules."""

from __future__ import annotations

import html
import re

from moebalance.report import write_report
from moebalance.report.diagnosis import counted, diagnose
from moebalance.runlog import find_runs
from synthetic_runs import write_run, write_runs


def found_in(folder):
    return [d for d in diagnose(find_runs(folder)) if d.evidence]


def test_runs_of_one_method_share_a_line_that_says_how_many_and_whose_numbers(tmp_path):
    folder = write_runs(tmp_path, methods=["none", "switch"], batchings=["mixed"], steps=200)
    found = found_in(folder)
    uneven = [(d, e) for d in found for e in d.evidence if e.finding.rule == "uneven"]
    assert [(d.method.method, e.where) for d, e in uneven] == [
        ("none", "in 3 of 3 runs, here seed 0")
    ]
    # One line for all layers that have dead experts, all of the same run.
    (dead,) = [e for d in found for e in d.evidence if e.finding.rule == "dead"]
    assert dead.finding.layers == (0, 1)
    assert "and 1 more layer likewise" in dead.finding.what
    assert dead.where == "in 3 of 3 runs, here seed 0"
    assert not any(d.method.method == "switch" for d in found)


def test_the_worst_comes_first_and_the_page_shows_it_beside_the_numbers(tmp_path):
    folder = write_runs(tmp_path, methods=["none"], seeds=[0, 1], batchings=["mixed"], steps=200)
    write_run(folder / "stopped", "phi", stop=150, steps=200)
    found = found_in(folder)
    for diagnosis in found:
        ranks = [evidence.finding.severity.rank for evidence in diagnosis.evidence]
        assert ranks == sorted(ranks)
    assert counted(found) == "2 warnings, 2 notes"
    page = html.unescape(write_report(find_runs(folder), tmp_path / "report.html").read_text())
    (block,) = re.findall(r'<details class="findings".*?</details>', page, re.DOTALL)
    assert "What the doctor finds in these runs: 2 warnings, 2 notes" in block
    for diagnosis in found:
        assert f"→ {diagnosis.advice}" in block
        for evidence in diagnosis.evidence:
            assert evidence.finding.what in block
            assert evidence.finding.because in block
            assert evidence.where in block
    assert block.count("→") == len(found)  # one recommendation for each method
    assert block.index("No balancing") < block.index("φ-balancing")  # the worst first
    assert not re.search(r"\bnan\b", block)


def test_a_run_that_failed_is_among_them_though_no_average_has_it(tmp_path):
    folder = write_runs(tmp_path, methods=["switch"], seeds=[0, 1], batchings=["mixed"], steps=200)
    write_run(folder / "failed", "switch", seed=2, steps=200, stop=120, end=False)
    (found,) = found_in(folder)
    (evidence,) = found.evidence
    assert evidence.finding.rule == "unfinished"
    assert evidence.where == "in 1 of 3 runs, here seed 2"


def test_where_nothing_is_wrong_the_page_says_nothing(tmp_path):
    write_runs(tmp_path, methods=["switch"], batchings=["mixed"], steps=200)
    page = write_report(find_runs(tmp_path), tmp_path / "report.html").read_text()
    assert 'class="findings"' not in page
