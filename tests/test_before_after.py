"""The report on fine-tuning: where it began, where it ended, and what was forgotten."""

from pathlib import Path

import pytest

from moebalance.report import summarise, write_markdown, write_report
from moebalance.report.before_after import BeforeAfter
from moebalance.runlog import LOG_NAME, Run

BEFORE = {"loss": 4.0, "maxvio": 3.5, "old_loss": 1.25, "old_maxvio": 0.5, "old_dead_experts": 0}


def fine_tuned(method: str, old_loss: list[float], *, steps: int = 5, **before: float) -> list[Run]:
    """Runs that began alike and ended with these losses on the old text, one a seed."""
    runs = []
    for seed, loss in enumerate(old_loss):
        header = {"kind": "header", "format": 1, "method": method, "seed": seed, "steps": 5}
        after = {"loss": 1.9, "maxvio": 0.4, "old_loss": loss, "old_maxvio": 1.0}
        start = {"kind": "eval", "step": 0, **BEFORE, **before}
        end = {"kind": "eval", "step": steps, "old_dead_experts": 2, **after}
        path = Path(f"{method}-{seed}/{LOG_NAME}")
        evals = (start, end) if steps else (start,)
        runs.append(Run(path, header | {"method_repr": ""}, evals=evals))
    return runs


def table(runs: list[Run]) -> BeforeAfter:
    (section,) = summarise(runs)
    assert section.before_after is not None
    return section.before_after


def test_one_line_says_where_all_methods_began_and_one_each_where_they_ended():
    found = table([*fine_tuned("none", [2.0, 2.2]), *fine_tuned("phi", [1.9, 2.1])])
    assert [line.label for line in found.lines] == ["Before", "φ-balancing", "No balancing"]
    old = [metric.key for metric in found.columns].index("old_loss")
    assert [line.cells[old].mean for line in found.lines] == pytest.approx([1.25, 2.0, 2.1])
    # No method counted dead experts on the new text, so there is no such column.
    assert [metric.key for metric in found.columns] == [
        *("loss", "maxvio", "old_loss", "old_maxvio", "old_dead_experts")
    ]


def test_methods_that_began_elsewhere_are_told_apart():
    runs = [*fine_tuned("none", [2.0]), *fine_tuned("sinkhorn", [2.0], maxvio=1.5)]
    assert [line.label for line in table(runs).lines][:2] == [
        "Before (Sinkhorn)",
        "Before (No balancing)",
    ]


def test_forgetting_is_judged_seed_by_seed_and_noise_is_called_noise():
    baseline = fine_tuned("none", [2.0, 2.5, 3.0])
    less = fine_tuned("phi", [1.9, 2.4, 2.9])
    more = fine_tuned("switch", [2.2, 2.71, 3.2])
    level = fine_tuned("loss-free", [1.9, 2.6, 3.0])
    assert table([*baseline, *less, *more, *level]).verdict == (
        "Relative to no balancing, the final loss on the old text is lower under φ-balancing, "
        "higher under Switch loss and within seed noise under Loss-free bias (95 % each, "
        "uncorrected for 3 comparisons)."
    )
    assert table([*baseline, *less]).verdict == (
        "Relative to no balancing, the final loss on the old text is lower under φ-balancing."
    )
    assert table(less).verdict == ""  # nothing to compare with
    assert table([*baseline[:1], *less[:1]]).verdict == ""  # one seed: noise unknown


def test_a_run_that_never_got_beyond_its_start_is_not_taken_for_its_end():
    runs = [*fine_tuned("none", [2.0]), *fine_tuned("phi", [2.0], steps=0)]
    (section,) = summarise(runs)
    phi = section.methods[0]
    assert (phi.method, phi.partial, dict(phi.estimates)) == ("phi", True, {})
    assert any("no evaluation, not in the averages" in note for note in section.notes)


def test_page_and_markdown_show_the_table_only_where_there_is_a_before(tmp_path):
    runs = [*fine_tuned("none", [2.0, 2.2]), *fine_tuned("phi", [1.9, 2.1])]
    page = write_report(runs, tmp_path / "r.html").read_text("utf-8")
    assert page.count("Before and after fine-tuning") == 1
    assert "<span>Before</span>" in page
    text = write_markdown(runs, tmp_path / "r.md", "R").read_text("utf-8")
    assert "| Before | 4.000 | 3.50 | 1.250 | 0.50 | 0.0 |" in text
    assert "| No balancing | 1.900 ± 0.000 | 0.40 ± 0.00 | 2.100 ± 0.141 |" in text
    later = [Run(run.path, run.header, evals=run.evals[1:]) for run in runs]
    assert "Before and after" not in write_report(later, tmp_path / "r.html").read_text("utf-8")
    assert "Before and after" not in write_markdown(later, tmp_path / "r.md", "R").read_text(
        "utf-8"
    )
